"""Scripts that measure; run one from the root of the checkout with ``python -m benchmarks.NAME``."""
