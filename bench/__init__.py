"""Measuring what was pruned: `run` measures, `gate` judges, `report` shows, `commands` lets a user ask for it.

`benchmark` is one measurement from beginning to end. `studies` made the numbers in the docs, `gpu` makes a GPU's,
`demo` shows everything once, and `assets` fetches the model and the texts that these and the tests use. No room imports
`studies`; may import the core and `serve`.
"""
