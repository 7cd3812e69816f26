"""A checkpoint file: which container it is, what it would cost to read, and reading it without running code."""
