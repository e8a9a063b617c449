"""The studies that made the numbers in the docs, a module each, to be run with `python -m`.

May import everything; nothing else imports it.
"""
