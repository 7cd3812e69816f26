"""Accuracy against cost or latency: one line of sizes for each family of models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Pairs that colour-blind readers can tell apart by the marker; vermilion is kept for the family in front.
_STYLES = (
    ('#0072B2', 's'),
    ('#009E73', '^'),
    ('#E69F00', 'D'),
    ('#CC79A7', 'v'),
    ('#56B4E9', 'P'),
    ('#444444', 'X'),
    ('#8c6d31', '<'),
    ('#5e4fa2', '>'),
    ('#7f7f7f', 'h'),
    ('#b2182b', 'p'),
    ('#1b7837', '*'),
    ('#9970ab', 'd'),
    ('#00441b', '8'),
)
_FRONT = '#D55E00'


def _style(number: int) -> tuple[str, str]:
    """Colour and marker of a family: the pairs, then each colour with the marker of another."""
    lap, place = divmod(number, len(_STYLES))
    return _STYLES[place][0], _STYLES[(place + 4 * lap) % len(_STYLES)][1]


@dataclass(frozen=True)
class Point:
    """One model.

    Attributes:
        x: Cost or latency.
        y: Accuracy.
        label: Short text beside the marker, a size say; '' for none.
    """

    x: float
    y: float
    label: str = ''


@dataclass(frozen=True)
class Panel:
    """One diagram.

    Attributes:
        families: Points by family, in the order of their sizes.
        title: Text above.
        x_label: What x is, with its unit.
        y_label: What y is, with its unit.
    """

    families: Mapping[str, Sequence[Point]]
    title: str
    x_label: str
    y_label: str


def save_comparison(panels: Sequence[Panel], families: Sequence[str], path: str | Path, note: str = '') -> None:
    """Draw panels side by side with one legend.

    Args:
        panels: At least one.
        families: All families, so that each keeps its looks from picture to picture; the first one is drawn last and
            strongest.
        note: Small text at the foot, for the sources.
    """
    figure = Figure(figsize=(4.6 * len(panels) + 1.7, 4.2), dpi=170, layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    front, *others = families
    styles = {name: _style(i) for i, name in enumerate(others)} | {front: (_FRONT, 'o')}
    for axis, panel in zip(axes, panels, strict=True):
        _draw(axis, panel, styles, front)
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    order = [name for name in families if name in handles]
    figure.legend([handles[name] for name in order], order, loc='outside right center', fontsize=8, frameon=False)
    if note:
        figure.supxlabel(note, fontsize=7, color='0.35')
    figure.savefig(path)


def _draw(axis: Axes, panel: Panel, styles: Mapping[str, tuple[str, str]], front: str) -> None:
    for name, points in panel.families.items():
        colour, marker = styles[name]
        first = name == front
        xs, ys = [p.x for p in points], [p.y for p in points]
        sizes = len(set(xs)) > 1  # of one model; else models of one size, which no line joins
        axis.plot(
            xs,
            ys,
            marker=marker,
            color=colour,
            label=name,
            markersize=7.5 if first else 6,
            linewidth=2.2 if first else 1.2,
            linestyle='-' if sizes else 'none',
            markeredgecolor='white',
            markeredgewidth=0.6,
            zorder=5 if first else 3,
        )
        for point in points:
            offset = ((0, 6) if first else (0, -11)) if sizes or len(xs) == 1 else (7, -2.5)
            axis.annotate(
                point.label,
                (point.x, point.y),
                xytext=offset,
                textcoords='offset points',
                ha='left' if offset[0] else 'center',
                fontsize=8 if first else 6.5,
                color=colour,
                fontweight='bold' if first else 'normal',
                zorder=6 if first else 4,
            )
    axis.set_title(panel.title, fontsize=10)
    axis.set_xlabel(panel.x_label, fontsize=9)
    axis.set_ylabel(panel.y_label, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.margins(0.07)
    for side in ('top', 'right'):
        axis.spines[side].set_visible(False)
