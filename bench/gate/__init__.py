"""Judging runs: budgets, comparisons, a verdict with its reasons, and its outputs.

May import run; knows nothing of reports or studies.
"""
