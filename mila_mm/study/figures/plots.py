"""The plots beside the study's tables: accuracy against cost and against latency, of published figures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from mila_mm.study.figures.comparison import Panel, Point, save_comparison
from mila_mm.study.published import Published

_FRONT = 'MILA'


def save_plots(published: Published, folder: str | Path) -> list[Path]:
    """Draw and write the plots.

    Args:
        folder: Where to; made if it is missing.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    detectors = published.tables['mask_rcnn'].rows
    classifiers = published.tables['classification'].rows
    names = dict.fromkeys(row['family'] for row in (*classifiers, *detectors))
    families = [_FRONT, *(name for name in names if name != _FRONT)]
    cost = [
        Panel(
            _families(classifiers, lambda r: r['macs'], lambda r: r['top1']),
            'ImageNet-1K, 224 x 224',
            'MACs (G)',
            'top-1 accuracy (%)',
        ),
        Panel(
            _families(detectors, lambda r: r['macs'], lambda r: r['one'] and r['one'][0]),
            'COCO, Mask R-CNN 1x, 1280 x 800',
            'MACs (G)',
            'box AP',
        ),
    ]
    save_comparison(
        cost,
        families,
        folder / 'study_accuracy_cost.png',
        'Published figures. MILA trains its 1x at several scales, the others at one.',
    )
    latency = {row['model']: row['ms'] for row in published.tables['latency'].rows}
    panel = Panel(
        _families(classifiers, lambda r: latency.get(r['model']), lambda r: r['top1']),
        'ImageNet-1K, RTX 3090',
        'latency of one image (ms)',
        'top-1 accuracy (%)',
    )
    save_comparison(
        [panel],
        families,
        folder / 'study_accuracy_latency.png',
        'Published figures; latencies were read off a plot to 0.05 ms.',
    )
    return [folder / 'study_accuracy_cost.png', folder / 'study_accuracy_latency.png']


def _families(
    rows: Iterable[Mapping[str, Any]],
    x: Callable[[Mapping[str, Any]], float | None],
    y: Callable[[Mapping[str, Any]], float | None],
) -> dict[str, list[Point]]:
    """Sort the rows that have both figures into families, each by its x."""
    families: dict[str, list[Point]] = {}
    for row in rows:
        if x(row) is not None and y(row) is not None:
            label = row['model'].removeprefix(row['family']).removeprefix('-Adapter').removeprefix('-')
            families.setdefault(row['family'], []).append(Point(x(row), y(row), label))
    return {name: sorted(points, key=lambda p: p.x) for name, points in families.items()}
