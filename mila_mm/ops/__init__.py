"""The attention ops: ``mila_attention`` of MILA and ``gated_linear_attention`` with Mamba's gates, and their kernels;
``cpe_norm`` and ``dwc_silu``, what a block does around them; ``mlp``; ``relu_dwc_relu``, the middle
of a downsampling; ``layer_norm`` in 16 bits; ``batch_norm`` with the ReLU behind it; ``column_sum``, bias gradients.

Needs torch alone; Triton is imported when a CUDA tensor comes.
"""

from mila_mm.ops.attention.op import mila_attention, why_not_triton
from mila_mm.ops.attention.reference import mila_attention_reference
from mila_mm.ops.batch_norm.op import batch_norm, why_not_triton_batch_norm
from mila_mm.ops.batch_norm.reference import batch_norm_reference
from mila_mm.ops.feed_forward.op import mlp
from mila_mm.ops.feed_forward.reference import mlp_reference
from mila_mm.ops.gated.op import gated_linear_attention
from mila_mm.ops.gated.reference import gated_linear_attention_reference
from mila_mm.ops.rope import clear_rope_cache, rope_tables
from mila_mm.ops.rows.op import column_sum, layer_norm
from mila_mm.ops.rows.reference import column_sum_reference, layer_norm_reference
from mila_mm.ops.stencil.down import relu_dwc_relu
from mila_mm.ops.stencil.op import cpe_norm, dwc_silu, why_not_triton_stencil
from mila_mm.ops.stencil.reference import cpe_norm_reference, dwc_silu_reference, relu_dwc_relu_reference

__all__ = [
    'batch_norm',
    'batch_norm_reference',
    'clear_rope_cache',
    'column_sum',
    'column_sum_reference',
    'cpe_norm',
    'cpe_norm_reference',
    'dwc_silu',
    'dwc_silu_reference',
    'gated_linear_attention',
    'gated_linear_attention_reference',
    'layer_norm',
    'layer_norm_reference',
    'mila_attention',
    'mila_attention_reference',
    'mlp',
    'mlp_reference',
    'relu_dwc_relu',
    'relu_dwc_relu_reference',
    'rope_tables',
    'why_not_triton',
    'why_not_triton_batch_norm',
    'why_not_triton_stencil',
]
