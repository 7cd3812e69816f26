"""The attention op of MILA: ``mila_attention``, its specification, and the kernels behind it.

Needs torch alone; Triton is imported when a CUDA tensor comes.
"""

from .attention import mila_attention, why_not_triton
from .reference import mila_attention_reference
from .rope import clear_rope_cache, rope_tables

__all__ = ['clear_rope_cache', 'mila_attention', 'mila_attention_reference', 'rope_tables', 'why_not_triton']
