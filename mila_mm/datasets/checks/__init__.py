"""Checks of data sets: plain functions over files and arrays, each of which returns what it found.

What needs a config or a built data set lies in ``mila_mm/engine/data``.
"""
