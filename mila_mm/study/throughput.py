"""Throughput of several models relative to one of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def relative_throughput(models: Mapping[str, nn.Module], images: Tensor, rounds: int) -> dict[str, dict[str, float]]:
    """Time inference of the models in turn, round by round, so that a noisy machine disturbs all alike.

    Args:
        models: By name; the first one is what the others are compared with.
        images: (B, 3, H, W), on the models' device.
        rounds: How often each model is timed, after one run that is not; at least 2.

    Returns:
        For each name the median images per second, and the median, q1 and q3 over the rounds of its throughput over
        that of the first model in the same round.
    """

    def seconds(model: nn.Module) -> float:
        start = time.perf_counter()
        model(images)
        if images.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    with torch.inference_mode():
        for model in models.values():
            seconds(model.eval())
        times = [{name: seconds(model) for name, model in models.items()} for _ in range(rounds)]
    first = next(iter(models))
    result: dict[str, Any] = {}
    for name in models:
        ratios = [t[first] / t[name] for t in times]
        q1, median, q3 = statistics.quantiles(ratios, n=4, method='inclusive')
        result[name] = {
            'images_per_s': len(images) / statistics.median(t[name] for t in times),
            'ratio': median,
            'ratio_q1': q1,
            'ratio_q3': q3,
        }
    return result
