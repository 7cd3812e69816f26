"""Linear attention with the gates of Mamba: one formula from the selective state space model to linear attention."""

from mila_mm.ops.gated.op import gated_linear_attention
from mila_mm.ops.gated.reference import gated_linear_attention_reference

__all__ = ['gated_linear_attention', 'gated_linear_attention_reference']
