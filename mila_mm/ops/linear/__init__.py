"""Linear layers and the MLP of a block: gradients of their weights and biases, in the dtype of those."""
