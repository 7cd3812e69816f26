"""Where weights come from: published names, the cache, downloads."""
