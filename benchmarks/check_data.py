"""Time and memory of checking an annotation file of COCO's size, the first time and the second.

    python -m benchmarks.check_data [--out FILE]

It makes a file of 118,000 images and 860,000 annotations with polygons of as many points as COCO's (some 450 MB), and
checks it as the start of a training does, each time in a process of its own.
"""

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

IMAGES, ANNOTATIONS, CLASSES, POINTS = 118_000, 860_000, 80, 30


def write_annotations(path: Path) -> None:
    """Write a file of COCO's size, annotation by annotation, so that making it costs no memory."""
    rng = random.Random(0)
    with path.open('w') as file:
        images = [dict(id=i, file_name=f'{i:012}.jpg', width=640, height=480) for i in range(IMAGES)]
        categories = [dict(id=i + 1, name=f'class {i}') for i in range(CLASSES)]
        file.write(f'{{"images": {json.dumps(images)}, "categories": {json.dumps(categories)}, "annotations": [')
        for i in range(ANNOTATIONS):
            x, y, w, h = (round(rng.uniform(1, 300), 2) for _ in range(4))
            polygon = [round(x + rng.random() * w, 2) for _ in range(2 * POINTS)]
            annotation = dict(id=i, image_id=i % IMAGES, category_id=1 + i % CLASSES, bbox=[x, y, w, h], area=w * h)
            annotation.update(iscrowd=int(i % 100 == 0), segmentation=[polygon])
            file.write((', ' if i else '') + json.dumps(annotation))
        file.write(']}')


def check(path: Path) -> dict[str, float]:
    """Check the file as the start of a training does, and return what it cost."""
    import mila_mm  # noqa: F401
    from mila_mm.datasets.checks.cache import cache_folder
    from mila_mm.datasets.checks.findings import Report
    from mila_mm.engine.config.load import load_config
    from mila_mm.engine.data.files import check_files
    from mila_mm.engine.data.splits import is_coco, splits_of

    cfg = load_config('mask_rcnn_mila_t_1x')
    dataset = cfg.train_dataloader.dataset
    dataset.update(data_root='', ann_file=str(path), metainfo=dict(classes=[f'class {i}' for i in range(CLASSES)]))
    splits = splits_of(cfg, ['train'], 'mmdet')
    assert all(is_coco(split.kind) for split in splits)  # imports mmdet, as every training does
    begin, cpu, report = time.perf_counter(), time.process_time(), Report()
    check_files(cfg, splits, cache_folder(), report)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    counts = report.counts['train_dataloader.dataset']
    assert (counts['images'], counts['boxes']) == (IMAGES, ANNOTATIONS), counts
    assert not report.of('error'), report.findings
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {'seconds': round(seconds, 2), 'cpu_seconds': round(cpu, 2), 'peak_gib': round(peak, 2)}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print, or write, the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, help='JSON file for the result')
    parser.add_argument('--check', type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.check:
        print(json.dumps(check(args.check)))
        return
    with TemporaryDirectory() as folder:
        path = Path(folder, 'instances.json')
        write_annotations(path)
        environment = {**os.environ, 'MILA_HOME': folder}
        command = [sys.executable, '-m', 'benchmarks.check_data', '--check', str(path)]
        runs = [
            json.loads(
                subprocess.run(
                    command, env=environment, check=True, capture_output=True, text=True
                ).stdout.splitlines()[-1]
            )
            for _ in range(2)
        ]
        result = {
            'first': runs[0],
            'second': runs[1],
            'file_mib': round(path.stat().st_size / 2**20),
            'images': IMAGES,
            'annotations': ANNOTATIONS,
            'cpus': os.cpu_count(),
            'python': platform.python_version(),
            'date': time.strftime('%Y-%m-%d'),
        }
    print(json.dumps(result, indent=2))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + '\n')


if __name__ == '__main__':
    main()
