"""Checks of a config's data and of what the model makes of it, before the first step."""
