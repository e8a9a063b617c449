"""Measuring a scenario: candidates in processes of their own, what each took, and the file that a run leaves.

Knows nothing of gates, reports or studies.
"""
