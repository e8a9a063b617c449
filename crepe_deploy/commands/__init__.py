"""The command line: shared options, one module a command, and beside each command the lines that it prints.

A command parses and calls one function of `api`. May import everything, heavy things inside functions only; nothing but
`cli` imports it.
"""
