"""The commands `bench`, `gate`, `report` and `bench init-ci`: options in, one call, what to print out.

May import run, gate, report and benchmark, inside functions only; nothing but the command line imports it.
"""
