"""Depthwise stencils of a block with what surrounds them: ``cpe_norm`` and ``dwc_silu``."""
