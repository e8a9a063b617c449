"""What every export has in common: the interface of a format, the run around it, the card, the greedy prompt.

Nothing here knows a format by name, and nothing here imports another folder of `export/`.
"""
