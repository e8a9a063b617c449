"""Hostile inputs and failing machines: a fork server around the real command line, and what is thrown at it.

`python -m tests.faults --help` runs as much of it as is asked for; the tests here are a quick share.
"""
