"""MILA's attention: its specification, the closed form on any device, the registered op, and Triton kernels."""
