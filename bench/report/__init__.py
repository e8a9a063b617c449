"""Benchmark runs as one offline page, PNG figures and a Markdown summary.

May import run; knows nothing of gates or studies.
"""
