"""What a test comes to beyond one figure: by class, by size, by kind of error, image by image."""
