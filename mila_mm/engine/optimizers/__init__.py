"""Optimizer wrappers and their constructors: mixed precision, layer-wise decay."""
