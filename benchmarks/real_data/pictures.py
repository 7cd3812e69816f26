"""A held-out image of nuclei and of bccd with what MILA finds on it; CamVid's licence keeps its images out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.real_data.tasks import KEY, Row

PICTURED = {'nuclei': 'CC0', 'bccd': 'MIT'}
HEIGHT = 360
"""Pixels of a picture."""


def folder_of(row: Row, work_dir: Path) -> Path:
    """Work folder of a row."""
    return work_dir / '-'.join(str(row[key]) for key in KEY if key != 'quick')


def draw(rows: Sequence[Row], size: str, data: Path, work_dir: Path, images: Path) -> None:
    """Draw the image beside what the longest run is surer of than one half, into ``real_data_SET.jpg``.

    Args:
        rows: All that have run.
        size: One of :data:`benchmarks.real_data.backbones.SIZES`.
        data: Folder of the sets.
        work_dir: Folder of the runs, with their checkpoints.
        images: Where to write.
    """
    import cv2

    from mila_mm.engine import Predictor

    for name in PICTURED:
        same = {'size': size, 'set': name, 'backbone': 'MILA', 'quick': False}
        done = [row for row in rows if row['final'] and all(row[key] == value for key, value in same.items())]
        if not done:
            print(f'{name}: no run of MILA to draw')
            continue
        row = max(done, key=lambda each: each['steps'])
        folder = folder_of(row, work_dir)
        checkpoint = (folder / 'last_checkpoint').read_text(encoding='utf-8').strip()
        config = max(
            folder.glob('*.py'), key=lambda path: path.stat().st_mtime
        )  # named after the run where it was swapped
        predictor = Predictor(str(config), checkpoint, device='cpu')
        path = sorted((data / name / 'val').iterdir())[1]
        image = cv2.imread(str(path))
        found = predictor.draw(image, predictor([image])[0], score_thr=0.5)
        both = cv2.hconcat([cv2.resize(each, None, fx=HEIGHT / each.shape[0], fy=HEIGHT / each.shape[0])
                            for each in (image, found)])  # fmt: skip
        out = images / f'real_data_{name}.jpg'
        cv2.imwrite(str(out), both, [cv2.IMWRITE_JPEG_QUALITY, 80])
        print(f'wrote {out}: {path.name} after {row["steps"]} steps')
