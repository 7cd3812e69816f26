"""A config on its way to a run: loading it, checking it, preparing the process, naming what cannot be built."""
