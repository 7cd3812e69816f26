"""The sweep: a swap of every config of both libraries, and what came of it."""
