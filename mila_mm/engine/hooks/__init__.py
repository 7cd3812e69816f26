"""Hooks of a training: checkpoints, stopping, resuming, non-finite values, pictures, MESA."""
