"""Checkpoint folder in, checkpoint folder out: one module for each format, listed in `EXPORTERS`."""
