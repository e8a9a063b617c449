"""The command line: options, one module a command, and beside each command the lines that it prints.

May import everything, heavy things inside functions only; nothing else imports it.
"""
