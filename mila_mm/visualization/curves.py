"""Curves of losses and metrics over the iterations of a run."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def read_scalars(path: str | Path) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Read the scalars that mmengine's ``LocalVisBackend`` writes.

    Args:
        path: A ``vis_data/scalars.json``, or ``vis_data/*.json``: one JSON object per line.

    Returns:
        The entries of training (those with a loss) and those of validation, in the order of the file.

    Raises:
        FileNotFoundError: If the file does not exist.
    """
    lines = Path(path).read_text(encoding='utf-8').splitlines()
    entries = [json.loads(line) for line in lines if line.strip()]
    return [e for e in entries if 'loss' in e], [e for e in entries if 'loss' not in e and 'step' in e]


def save_curves(
    training: Sequence[Mapping[str, float]],
    validation: Sequence[Mapping[str, float]],
    metrics: Mapping[str, str],
    path: str | Path,
    *,
    title: str = '',
) -> None:
    """Draw the losses on the left and the metrics on held-out images on the right.

    Args:
        training: Entries with ``step``, ``loss`` and any number of its parts, whose names hold 'loss'.
        validation: Entries with ``step`` (the iteration) and the metrics.
        metrics: Key of a metric to the name it is drawn under. Those that no entry has are left out.
        title: Line above both. Defaults to none.
    """
    figure = Figure(figsize=(12, 4.6), dpi=110, layout='constrained')
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    if title:
        figure.suptitle(title, fontsize=12)
    steps = [entry['step'] for entry in training]
    parts = sorted({key for entry in training for key in entry if 'loss' in key and key != 'loss'})
    left.plot(steps, [entry['loss'] for entry in training], color='black', linewidth=2, label='loss')
    for part in parts:
        points = [(entry['step'], entry[part]) for entry in training if part in entry]
        left.plot(*zip(*points, strict=True), linewidth=1.2, label=part)
    _dress(left, 'training loss', 'upper right')
    for key, name in metrics.items():
        points = [(entry['step'], entry[key]) for entry in validation if key in entry]
        if points:
            label = f'{name}, at the end {points[-1][1]:.3g}'
            right.plot(*zip(*points, strict=True), marker='o', markersize=4, linewidth=1.8, label=label)
    _dress(right, 'held-out images', 'lower right')
    figure.savefig(path)


def _dress(axes: Axes, title: str, legend: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel('iteration')
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.margins(x=0.06)
    for side in ('top', 'right'):
        axes.spines[side].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, loc=legend, framealpha=0.9)
