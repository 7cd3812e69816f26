"""A trace made at one size is right at every other: sizes that need padding are those that went wrong."""

import pytest
import torch

from mila_mm.nn.classifier import MILAClassifier


@pytest.mark.parametrize('traced_at', [(64, 96), (33, 50)])
def test_a_trace_serves_other_sizes(traced_at):
    torch.manual_seed(0)
    model = MILAClassifier('nano', num_classes=5).eval()
    with torch.no_grad():
        trace = torch.jit.trace(model, (torch.rand(1, 3, *traced_at),), check_trace=False)
        for size in ((64, 96), (72, 48), (70, 50), (33, 129), (1, 7)):
            x = torch.rand(1, 3, *size)
            torch.testing.assert_close(trace(x), model(x), rtol=1e-4, atol=1e-5)
