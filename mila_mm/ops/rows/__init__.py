"""What walks tokens as rows, whatever map they form: sums of columns (gradients of biases), LayerNorm."""
