"""Label maps of semantic segmentation: values, channels, depth, size, and what a set of them holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

from mila_mm.datasets.checks.findings import Finding, error, note, shown, warning

# Above this share of ignored pixels a set is worth a line.
_MOSTLY_IGNORED = 0.9
# With reduce_zero_label, above this share of value 0 it may well be a class.
_MUCH_OF_ZERO = 0.2
# This many maps of a set speak for all.
_ENOUGH = 16


@dataclass
class MapSummary:
    """What was seen in the label maps of a split.

    Attributes:
        seen: Maps looked at.
        total: Maps that there are.
        raw: Values as the files hold them, to pixels.
        labels: Values after the loader (zero label reduced, classes mapped), to pixels.
        findings: Faults of single maps, the first of each kind.
    """

    total: int
    seen: int = 0
    raw: Counter[int] = field(default_factory=Counter)
    labels: Counter[int] = field(default_factory=Counter)
    findings: dict[str, Finding] = field(default_factory=dict)

    def add(self, raw: np.ndarray, labels: np.ndarray) -> None:
        """Take in a map as its file holds it and as the loader gives it, both (H, W) of whole numbers."""
        self.seen += 1
        for counter, values in ((self.raw, raw), (self.labels, labels)):
            numbers, counts = np.unique(values, return_counts=True)
            counter.update(dict(zip(numbers.tolist(), counts.tolist(), strict=True)))


def spread(total: int, wanted: int) -> list[int]:
    """Return positions spread evenly over a set, all where ``wanted`` is 0 or there are no more."""
    if wanted <= 0 or wanted >= total:
        return list(range(total))
    return sorted({round(i * (total - 1) / max(wanted - 1, 1)) for i in range(wanted)})


def fault_of_map(
    path: str, raw: np.ndarray, image_path: str, image_shape: Sequence[int] | None, lossy: bool = False
) -> Finding | None:
    """Check one label map as its file holds it.

    Args:
        path: Its file.
        raw: The decoded file, (H, W) or (H, W, channels).
        image_path: The file of the image that it belongs to.
        image_shape: Height and width of that image, None where it is not known.
        lossy: Whether the file is a JPEG. Defaults to False.
    """
    if raw.ndim == 3 and raw.shape[-1] > 1:
        what = {2: 'grey and alpha', 3: 'RGB', 4: 'RGB and alpha'}.get(raw.shape[-1], 'several channels')
        return error(
            f'label map {path}',
            f'has {raw.shape[-1]} channels ({what}), expected an index map: one channel, each pixel the number of its '
            'class; a palette PNG has that too',
        )
    raw = raw.squeeze(-1) if raw.ndim == 3 else raw
    if lossy:
        return error(f'label map {path}', 'is a JPEG, which moves values along every edge: save label maps as PNG')
    if not np.issubdtype(raw.dtype, np.integer) and raw.dtype != bool:
        return error(f'label map {path}', f'holds {raw.dtype}, expected whole numbers')
    if raw.dtype.itemsize > 1 and raw.size and (raw.max() > 255 or raw.min() < 0):
        return error(
            f'label map {path}',
            f'holds values up to {raw.max()} in {8 * raw.dtype.itemsize} bit; the loader keeps 8 bit, where '
            f'{raw.max()} becomes {int(raw.max()) % 256}',
        )
    if image_shape is not None and tuple(raw.shape) != tuple(image_shape):
        return error(
            f'label map {path}',
            f'is {raw.shape[1]} x {raw.shape[0]} (width x height), its image {image_path} is '
            f'{image_shape[1]} x {image_shape[0]}',
        )
    return None


def judge_maps(
    where: str, summary: MapSummary, classes: Sequence[str], ignored: Collection[int], reduced: bool
) -> list[Finding]:
    """Say what is wrong with the label maps of a split.

    Args:
        where: Key of the data set in the config.
        summary: What was seen.
        classes: Class names.
        ignored: Labels that the loss ignores.
        reduced: Whether the loader turns 0 into ignored and takes one from the others (``reduce_zero_label``).
    """
    if not summary.seen:
        return []
    all_of = 'all' if summary.seen == summary.total else f'{summary.seen} of'
    looked = f'in {all_of} {summary.total} label maps'
    pixels = sum(summary.labels.values())
    found = sorted(label for label in summary.labels if 0 <= label < len(classes) and label not in ignored)
    share = sum(summary.labels[label] for label in ignored) / max(pixels, 1)
    complete = summary.seen == summary.total or summary.seen >= _ENOUGH
    if not found:
        # A set of which few images are labelled is sound, however many of its maps are wholly ignored.
        level = error if summary.seen == summary.total else warning
        return [level(where, f'{looked}, every pixel is ignored ({shown(sorted(summary.raw))}): nothing to learn')]
    if {0, 255} == set(summary.raw) == set(summary.labels) and len(classes) > 1 and 255 in ignored:
        text = (
            f'{looked}, the values are 0 and 255, and 255 is ignored: no foreground is ever seen. Write 255 as 1 '
            '(mask[mask == 255] = 1) and save the maps again'
        )
        return [error(where, text) if complete else warning(where, text)]
    findings = []
    if share > _MOSTLY_IGNORED:
        findings.append(
            warning(where, f'{looked}, {100 * share:.1f} % of the pixels are ignored ({_ignored(reduced)})')
        )
    never = [name for index, name in enumerate(classes) if index not in found]
    if len(found) == 1 and len(classes) > 1:
        findings.append(warning(where, f'{looked}, {classes[found[0]]!r} is the only class that occurs: {_why(never)}'))
    elif never:
        findings.append(note(where, f'{looked}, {len(never)} of {len(classes)} classes never occur: {shown(never)}'))
    if reduced and never == [classes[-1]] and summary.raw[0] > _MUCH_OF_ZERO * pixels and complete:
        findings.append(
            warning(
                where,
                f'{looked}, {classes[-1]!r} never occurs and reduce_zero_label=True ignores value 0, '
                f'{100 * summary.raw[0] / pixels:.0f} % of the pixels: is 0 a class of its own?',
            )
        )
    return findings


def _ignored(reduced: bool) -> str:
    return 'with reduce_zero_label, value 0 is ignored too' if reduced else 'value 255'


def _why(never: Sequence[str]) -> str:
    return f'{shown(never)} never do'


def fault_of_labels(
    path: str, labels: np.ndarray, raw: np.ndarray, classes: Sequence[str], ignored: Collection[int], reduced: bool
) -> Finding | None:
    """Check that the labels of one map, after the loader, are of a class or ignored.

    Args:
        path: Its file.
        labels: What the loader gives, (H, W).
        raw: What the file holds, (H, W).
        classes: Class names.
        ignored: Labels that the loss ignores.
        reduced: Whether ``reduce_zero_label`` is set.
    """
    outside = [int(v) for v in np.unique(labels) if not 0 <= v < len(classes) and int(v) not in ignored]
    if not outside:
        return None
    # What the user has in the file, not what the loader made of it.
    told = sorted({int(v) for v in np.unique(raw[np.isin(labels, outside)])})
    first, last = (1, len(classes)) if reduced else (0, len(classes) - 1)
    hint = ''
    if told == [len(classes)] and not reduced:
        hint = '; are the classes counted from 1? Then reduce_zero_label=True, or all labels are shifted by one'
    besides = f'{", ".join(map(str, sorted(ignored)))} is ignored' if ignored else 'none is ignored'
    return error(
        f'label map {path}',
        f'has value {shown(told)}, which no class has: the {len(classes)} classes are values {first} to {last}, '
        f'{besides}{hint}',
    )
