"""Linear attention with Mamba's gates: the operator of the study."""
