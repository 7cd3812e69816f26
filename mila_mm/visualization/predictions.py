"""A grid of images, each with the truth and a prediction beside it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

_SAMPLES_PER_ROW = 2
_PANEL_INCHES = 2.3
# Width of a score in print, and of an entry of the legend.
_SCORE_INCHES, _LEGEND_INCHES = 0.24, 1.1


@dataclass(frozen=True)
class Labels:
    """What there is in an image, as masks.

    Attributes:
        masks: (N, H, W) bool. Later ones are drawn over earlier ones.
        classes: (N,) int, indices of classes.
        boxes: (N, 4) float as x1, y1, x2, y2 in pixels, or None to draw none.
        scores: (N,) float in 0 .. 1, or None.
    """

    masks: np.ndarray
    classes: np.ndarray
    boxes: np.ndarray | None = None
    scores: np.ndarray | None = None


@dataclass(frozen=True)
class Sample:
    """An image (H, W, 3) uint8 RGB with its truth and a prediction."""

    image: np.ndarray
    truth: Labels
    prediction: Labels


def save_predictions(
    samples: Sequence[Sample],
    class_names: Sequence[str],
    palette: Sequence[Sequence[int]],
    path: str | Path,
    *,
    title: str = '',
    panel_inches: float = _PANEL_INCHES,
) -> None:
    """Draw samples in a grid, two to a row, each as image, truth and prediction.

    Args:
        samples: What to draw, at least one.
        class_names: Names by class index, for the legend.
        palette: RGB colour of each class, 0 to 255.
        title: Line above the grid. Defaults to none.
        panel_inches: Side of each of the pictures. Defaults to 2.3.
    """
    per_row = min(_SAMPLES_PER_ROW, len(samples))
    rows = -(-len(samples) // per_row)
    wide = panel_inches * (3 * per_row + 0.15)
    columns = max(1, min(len(class_names), int(wide / _LEGEND_INCHES)))
    legend = 0.4 + 0.2 * (-(-len(class_names) // columns) - 1)
    figure = Figure(figsize=(wide, panel_inches * rows + 0.5 + legend), dpi=110)
    FigureCanvasAgg(figure)
    # A narrow empty column keeps the samples of a row apart.
    widths = [width for i in range(per_row) for width in ([0.12] if i else []) + [1, 1, 1]]
    grid = figure.subplots(
        rows,
        len(widths),
        squeeze=False,
        gridspec_kw={
            'width_ratios': widths, 'wspace': 0.03, 'hspace': 0.03,
            'left': 0.005, 'right': 0.995,
            'bottom': legend / figure.get_figheight(), 'top': 1 - 0.5 / figure.get_figheight(),
        },
    )  # fmt: skip
    for axes in grid.flat:
        axes.set_axis_off()
    colours = np.asarray(palette, dtype=float) / 255
    for index, sample in enumerate(samples):
        row, column = divmod(index, per_row)
        panels = grid[row, 4 * column : 4 * column + 3]
        for axes, labels in zip(panels, (None, sample.truth, sample.prediction), strict=True):
            _draw(axes, sample.image, labels, colours, panel_inches)
        if row == 0:
            for axes, name in zip(panels, ('image', 'truth', 'prediction'), strict=True):
                axes.set_title(name, fontsize=10, pad=3)
    if title:
        figure.suptitle(title, fontsize=12, y=1 - 0.08 / figure.get_figheight())
    handles = [Patch(color=colour, label=name) for colour, name in zip(colours, class_names, strict=True)]
    figure.legend(handles=handles, loc='lower center', ncols=columns, fontsize=10, frameon=False)
    figure.savefig(path)


def _draw(axes: Axes, image: np.ndarray, labels: Labels | None, colours: np.ndarray, panel_inches: float) -> None:
    """Draw an image and, where there are labels, their masks, outlines, boxes and, with room for them, scores."""
    height, width = image.shape[:2]
    room = _SCORE_INCHES / panel_inches * max(height, width)
    if labels is None:
        axes.imshow(image, interpolation='nearest')
        return
    # A grey image lets the colours of the classes speak.
    canvas = np.repeat(image.mean(axis=2, keepdims=True) / 255 * 0.75 + 0.1, 3, axis=2)
    for mask, label in zip(labels.masks, labels.classes, strict=True):
        canvas[mask] = 0.35 * canvas[mask] + 0.65 * colours[label]
    axes.imshow(canvas, interpolation='nearest')
    for number, (mask, label) in enumerate(zip(labels.masks, labels.classes, strict=True)):
        if mask.any():
            axes.contour(np.pad(mask, 1), levels=[0.5], colors=[colours[label] * 0.6], linewidths=0.9,
                         extent=(-1.5, width + 0.5, -1.5, height + 0.5))  # fmt: skip
        if labels.boxes is not None:
            x1, y1, x2, y2 = labels.boxes[number] - 0.5  # pixel centres are at whole numbers here
            axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color=colours[label], linewidth=1.1))
            if labels.scores is not None and x2 - x1 >= room:
                axes.text(x1, y1, f'{labels.scores[number]:.2f}', fontsize=6, color='white', va='top', clip_on=True,
                          bbox={'facecolor': colours[label] * 0.7, 'edgecolor': 'none', 'pad': 0.6})  # fmt: skip
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(height - 0.5, -0.5)
