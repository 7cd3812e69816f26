"""What Triton kernels share: whether they can run, launch settings, tensors as they take them, device functions."""
