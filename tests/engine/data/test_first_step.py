"""The watch over the first step names a BatchNorm of one value, and changes no step."""

import pytest
import torch
from torch import nn

from mila_mm import MILA
from mila_mm.engine.data.first_step import BatchNormWatch
from mila_mm.errors import UserError

MICRO = dict(embed_dim=16, depths=(1, 1), num_heads=(1, 2))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = MILA(MICRO, out_indices=(0, 1), norm_eval=True)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.backbone(x)
        return self.head(second) + first[:, :1, :1, :1]


def gradients(model: nn.Module, image: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    out = model(image)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def test_a_watched_step_is_the_step_bit_for_bit() -> None:
    torch.manual_seed(0)
    model, image = Model().train(), torch.randn(3, 3, 48, 40)
    expected = gradients(model, image)
    watch = BatchNormWatch(model, last_batch=2)
    watched = gradients(model, image)
    watch.stop()
    assert all(torch.equal(a, b) for a, b in zip(watched, expected, strict=True))


@pytest.mark.parametrize(('last_batch', 'images', 'words'), [(0, 1, 'one image a step'), (1, 2, 'last batch')])
def test_one_value_a_channel_is_named(last_batch: int, images: int, words: str) -> None:
    model = Model().train()
    watch = BatchNormWatch(model, last_batch)
    with pytest.raises(UserError, match=rf'(?s)model\.head\.1: .*{words}'):
        model(torch.randn(images, 3, 48, 40))
    watch.stop()
    assert not any(module._forward_pre_hooks for module in model.modules())
