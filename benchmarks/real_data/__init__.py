"""MILA beside ResNet, Swin and ConvNeXt of the same cost on three sets of a few hundred real images."""
