"""Inputs as people have them, made small. Every command is run over all of them; the rest of the tests may use them."""
