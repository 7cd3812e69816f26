"""Predictions of a trained model on pictures, folders, videos and cameras."""
