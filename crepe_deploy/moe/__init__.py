"""`experts`: how much each expert of a layer matters, which go, and what is left of the files without them.

`measure.py` meters a layer while text passes, `methods.py` chooses, `scores.py` keeps what was measured, `cut.py` says
what becomes of each tensor. In come `store`, `model` and what stands above them; nothing here writes a folder.
"""
