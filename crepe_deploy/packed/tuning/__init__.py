"""Measuring which kernel is fastest, and remembering it: one `Tuner` for every kind of device.

Nothing here knows a kernel, a weight or a device: a dispatcher brings its choices, its keys and its clock.
"""
