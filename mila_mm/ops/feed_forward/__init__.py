"""The MLP of a block without its hidden map in memory: fc1, GELU, fc2 and the sum with the shortcut."""
