"""Readers of COCO's files compute what an annotation lacks, and change nothing else."""

import importlib

import pytest


@pytest.mark.parametrize('name', ['pycocotools.coco', 'faster_coco_eval.core.coco'])
def test_area_and_iscrowd(name) -> None:
    pytest.importorskip(name.partition('.')[0])
    coco = importlib.import_module(name).COCO()
    base = dict(image_id=1, category_id=1, bbox=[0, 0, 3, 4])
    coco.dataset = dict(
        images=[dict(id=1)],
        categories=[dict(id=1)],
        annotations=[dict(base, id=1), dict(base, id=2, area=5, iscrowd=1), dict(id=3, image_id=1, category_id=1)],
    )
    coco.createIndex()
    assert (coco.anns[1]['area'], coco.anns[1]['iscrowd']) == (12, 0)
    assert (coco.anns[2]['area'], coco.anns[2]['iscrowd']) == (5, 1)
    assert 'area' not in coco.anns[3]  # without a box there is nothing to compute it from
