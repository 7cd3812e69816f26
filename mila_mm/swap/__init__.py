"""MILA in place of the backbone of any mmdet or mmseg config."""

from mila_mm.swap.api import plan_swap, swap_backbone
from mila_mm.swap.result import Change, Maps, SwapFailed, SwapRefused, SwapResult
from mila_mm.swap.writer import check_child, check_out, child_text, report, write_child

__all__ = [
    'Change',
    'Maps',
    'SwapFailed',
    'SwapRefused',
    'SwapResult',
    'check_child',
    'check_out',
    'child_text',
    'plan_swap',
    'report',
    'swap_backbone',
    'write_child',
]
