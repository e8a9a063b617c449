"""Structural pruning: which KV groups, query heads and FFN neurons of each layer stay, and the smaller model they make.

Modules (imported on demand, so that this package stays light):
    plan       Geometry, LayerPlan: the shape of a decoder, and what one of its layers keeps
"""
