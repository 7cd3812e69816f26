"""A whole block of MILA by Triton kernels, and what launching it again in the same shape needs: one plan a shape."""
