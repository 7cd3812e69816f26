"""The figures of the study, drawn for print: gates, decay windows, lengths of tokens, effective receptive fields."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, PowerNorm
from matplotlib.figure import Figure

from mila_mm.study.figures.probes import GateMap, LayerValue, area_ratios

# Okabe and Ito's colours, which stay apart for colour-blind readers.
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')
_MARKERS = 'osD^vPX'
_STYLE = {
    'font.size': 8,
    'axes.titlesize': 8,
    'axes.labelsize': 8,
    'xtick.labelsize': 7,
    'ytick.labelsize': 7,
    'legend.fontsize': 7,
    'axes.linewidth': 0.6,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'xtick.major.width': 0.6,
    'ytick.major.width': 0.6,
    'lines.linewidth': 1.3,
    'lines.markersize': 3.5,
}
_DPI = 200
_FLOOR = 1e-4  # of the largest contribution: what a logarithmic receptive field shows as nothing


@contextmanager
def _figure(path: str | Path, width: float, height: float) -> Iterator[Figure]:
    """Give an empty figure of a size in inches; write it at the end."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), dpi=_DPI, layout='constrained')
        FigureCanvasAgg(figure)
        yield figure
        figure.savefig(path)


def _layer_axis(axes: Axes, layers: Sequence[tuple[int, int]]) -> None:
    """Number the blocks from 1, and mark the stages."""
    axes.set_xlabel('block')
    axes.set_xlim(0.5, len(layers) + 0.5)
    axes.set_xticks(range(1, len(layers) + 1), minor=len(layers) > 16)
    first = [i for i, (_, block) in enumerate(layers) if block == 0]
    for number, (start, end) in enumerate(zip(first, [*first[1:], len(layers)], strict=True)):
        if number % 2:
            axes.axvspan(start + 0.5, end + 0.5, color='0.94', linewidth=0, zorder=0)
        axes.text(
            (start + end + 1) / 2,
            1.01,
            f'stage {layers[start][0] + 1}',
            transform=axes.get_xaxis_transform(),
            ha='center',
            va='bottom',
            fontsize=7,
            color='0.35',
        )


def save_layer_curves(
    curves: Mapping[str, Sequence[LayerValue]],
    path: str | Path,
    ylabel: str,
    *,
    log: bool = False,
    limits: tuple[float, float] | None = None,
) -> None:
    """Draw a number per block, a line for each model, with the range from the 10 % to the 90 % quantile.

    Args:
        curves: Label to the values of all blocks; the blocks must be the same for all.
        log: Whether the axis is logarithmic. Defaults to False.
        limits: Ends of the axis. Defaults to what fits.

    Raises:
        ValueError: If the models differ in their blocks, or there is none.
    """
    layers = {tuple((v.stage, v.block) for v in values) for values in curves.values()}
    if len(layers) != 1:
        raise ValueError(
            f'expected models with the same blocks to draw over each other, got {len(layers)} different depths'
            if layers
            else 'expected at least one model to draw'
        )
    (blocks,) = layers
    with _figure(path, max(3.3, 1.4 + 0.24 * len(blocks)), 2.3) as figure:
        axes = figure.subplots()
        x = np.arange(1, len(blocks) + 1)
        for (label, values), (colour, marker) in zip(curves.items(), _styles(), strict=False):
            axes.fill_between(
                x, [v.low for v in values], [v.high for v in values], color=colour, alpha=0.16, linewidth=0
            )
            axes.plot(x, [v.value for v in values], color=colour, marker=marker, label=label)
        axes.set_ylabel(ylabel)
        if log:
            axes.set_yscale('log')
        if limits is not None:
            axes.set_ylim(*limits)
        _layer_axis(axes, blocks)
        axes.grid(axis='y', color='0.88', linewidth=0.5)
        axes.set_axisbelow(True)
        if len(curves) > 1:
            axes.legend(frameon=False)


def _styles() -> Iterator[tuple[str, str]]:
    """Give a colour and a marker for one line after the other, without end."""
    while True:
        yield from zip(COLOURS, _MARKERS, strict=True)


def save_gate_maps(images: np.ndarray, gates: Sequence[GateMap], path: str | Path) -> None:
    """Draw images in rows, each followed by the input gates of some blocks, each column from its lowest to its highest.

    Args:
        images: (B, H, W, 3) uint8 RGB.
        gates: Blocks, in columns.
    """
    height, width = images.shape[1:3]
    panel = 1.15
    with _figure(path, panel * (len(gates) + 1) + 0.5, panel * height / width * len(images) + 0.45) as figure:
        grid = figure.subplots(len(images), len(gates) + 1, squeeze=False)
        for row, image in enumerate(images):
            _panel(grid[row, 0]).imshow(image)
            for column, gate in enumerate(gates, start=1):
                low, high = float(gate.maps.min()), float(gate.maps.max())
                relative = (gate.maps[row] - low) / max(high - low, np.finfo(np.float32).tiny)
                drawn = _panel(grid[row, column]).imshow(
                    relative, cmap='viridis', vmin=0, vmax=1, extent=(0, width, height, 0), interpolation='nearest'
                )
                grid[0, column].set_title(f'stage {gate.stage + 1}, block {gate.block + 1}')
                grid[-1, column].set_xlabel(f'{low:.3g} to {high:.3g}')
        grid[0, 0].set_title('image')
        bar = figure.colorbar(drawn, ax=grid, aspect=28, pad=0.015)
        bar.set_ticks([0, 1], labels=['lowest', 'highest'])
        bar.outline.set_linewidth(0.4)


def _panel(axes: Axes) -> Axes:
    """Take the frame and the ticks off axes."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_frame_on(False)
    return axes


def save_decay_windows(
    path: str | Path, gates: Sequence[float] = (0.2, 0.6, 0.8), length: int = 24, negligible: float = 0.01
) -> None:
    """Draw what a constant forget gate means: token j weighs A^(i - j) in the state at token i.

    Args:
        gates: Values of A, in (0, 1).
        length: Tokens in the matrices. Defaults to 24.
        negligible: Weight below which a token counts as forgotten. Defaults to 0.01.

    Raises:
        ValueError: If a gate is not in (0, 1).
    """
    if not gates or not all(0 < gate < 1 for gate in gates):
        raise ValueError(f'expected forget gates in (0, 1), got {gates!r}')
    distance = np.arange(length)
    with _figure(path, 1.45 * len(gates) + 2.5, 1.95) as figure:
        grid = figure.subplots(1, len(gates) + 1, width_ratios=[1] * len(gates) + [1.45])
        for axes, gate in zip(grid, gates, strict=False):
            lag = distance[:, None] - distance
            weights = np.where(lag >= 0, float(gate) ** np.maximum(lag, 0), np.nan)
            drawn = axes.imshow(weights, cmap='viridis', vmin=0, vmax=1, interpolation='nearest')
            axes.set_title(f'$A = {gate:g}$')
            axes.set_xlabel('token $j$')
            axes.set_xticks([])
            axes.set_yticks([])
        grid[0].set_ylabel('state $i$')
        figure.colorbar(
            drawn, ax=list(grid[:-1]), location='left', aspect=24, shrink=0.75, label='weight of $j$ in $i$'
        )
        curve = grid[-1]
        for gate, (colour, marker) in zip(gates, _styles(), strict=False):
            reach = forgotten_after(gate, negligible)
            curve.plot(
                distance,
                gate ** distance.astype(float),
                color=colour,
                marker=marker,
                markevery=2,
                label=f'$A = {gate:g}$: {reach} tokens',
            )
        curve.axhline(negligible, color='0.5', linewidth=0.7, linestyle='--')
        curve.set_yscale('log')
        curve.set_ylim(negligible / 3, 60)  # room for the legend above the curves
        curve.set_yticks([0.01, 0.1, 1])
        curve.minorticks_off()
        curve.set_xlabel('distance $i - j$ in tokens')
        curve.set_ylabel('weight $A^{i-j}$')
        curve.set_title(f'until the weight is below {negligible:.0%}')
        curve.legend(frameon=False, loc='upper right', borderaxespad=0)


def forgotten_after(gate: float, negligible: float = 0.01) -> int:
    """Return the smallest distance k with gate^k below ``negligible``."""
    return int(np.floor(np.log(negligible) / np.log(gate))) + 1


def save_receptive_fields(
    fields: Mapping[str, np.ndarray],
    path: str | Path,
    *,
    scale: str = 'log',
    thresholds: Sequence[float] = (0.2, 0.3, 0.5, 0.99),
    per_row: int = 4,
) -> None:
    """Draw effective receptive fields side by side, with the area that holds given shares of the contributions.

    Args:
        fields: Label to (H, W), at least 0.
        scale: 'log' from a ten-thousandth of the largest contribution on, or 'gamma' for its fourth root.
        thresholds: Shares whose area is written below.
        per_row: Pictures in a row at most. Defaults to 4.

    Raises:
        ValueError: For another scale.
    """
    if scale not in ('log', 'gamma'):
        raise ValueError(f"expected scale 'log' or 'gamma', got {scale!r}")
    rows = -(-len(fields) // per_row)
    columns = -(-len(fields) // rows)
    tallest = max(field.shape[0] / field.shape[1] for field in fields.values())
    with _figure(path, 1.6 * columns + 0.7, (1.6 * tallest + 0.62) * rows) as figure:
        grid = figure.subplots(rows, columns, squeeze=False)
        norm = LogNorm(_FLOOR, 1) if scale == 'log' else PowerNorm(0.25, 0, 1)
        for axes in grid.flat:
            _panel(axes).set_visible(False)
        for axes, (label, field) in zip(grid.flat, fields.items(), strict=False):
            axes.set_visible(True)
            relative = field / field.max()
            drawn = axes.imshow(np.maximum(relative, _FLOOR) if scale == 'log' else relative, cmap='magma', norm=norm)
            axes.set_title(label)
            shares = ' / '.join(f'{100 * t:g}' for t in thresholds)
            areas = ' / '.join(f'{100 * area:.1f}' for area in area_ratios(field, thresholds))
            axes.set_xlabel(f'area with {shares} %:\n{areas} %', fontsize=6.5)
        figure.colorbar(drawn, ax=grid, aspect=28, shrink=0.8, label='contribution over the largest')
