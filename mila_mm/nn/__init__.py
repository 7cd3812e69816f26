"""MILA in plain PyTorch: layers, trunk, classifier and its names in timm."""
