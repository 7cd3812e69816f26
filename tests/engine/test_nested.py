from collections import OrderedDict, namedtuple

import torch
from mmengine.config import ConfigDict

from mila_mm.engine.nested import tensors_in


def test_tensors_are_found_in_order_at_any_depth_and_in_subclasses() -> None:
    pair = namedtuple('pair', 'left right')
    a, b, c, d = (torch.full((1,), float(i)) for i in range(4))
    value = OrderedDict(x=[a, (b,)], y=ConfigDict(z=dict(deep=c)), n=None, s='text', p=pair(torch.ones(1).int(), d))
    assert [id(tensor) for tensor in tensors_in(value)] == [id(tensor) for tensor in (a, b, c, d)]


def test_integers_and_booleans_are_passed_over() -> None:
    assert list(tensors_in([torch.arange(3), torch.ones(2, dtype=torch.bool)])) == []
    assert len(list(tensors_in({'half': torch.ones(1, dtype=torch.bfloat16)}))) == 1
