"""The smaller checkpoint that remains when heads and neurons are gone: its layouts, and how it is sliced and proven.

`crepe_deploy.structural` decides what is kept; here only files are written. It may use `frame/`.
"""
