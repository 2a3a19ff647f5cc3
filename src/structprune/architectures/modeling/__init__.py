"""Modelling files that an output carries where no stock config can express it, and the layers that they need.

Read first: `per_layer.py`, the file for blocks of different widths.
"""
