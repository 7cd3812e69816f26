"""What follows a convolution of the stem: BatchNorm in training mode, with the ReLU behind it."""
