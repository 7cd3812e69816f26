"""The table of exported files: rows from pytest's report, the worst of each family, and what failed by name."""

import json

import pytest

from benchmarks.export_checks import rows_of, table

BOXES = dict(kind='detector', detections=4, unpaired=0, boxes=1e-5, scores=2e-7, masks=0.999, pixels=None)
WORSE = {**BOXES, 'boxes': 3e-5, 'masks': 1.0}
MAPS = dict(kind='segmentor', detections=0, unpaired=0, boxes=0.0, scores=0.0, masks=None, pixels=0.9995)


def case(name, model=None, compared=None, inside=''):
    said = ''.join(
        f'<property name="{key}" value="{value}"/>'
        for key, value in (('model', model), ('compared', compared and json.dumps(compared).replace('"', '&quot;')))
        if value
    )
    return f'<testcase name="{name}" time="1.5"><properties>{said}</properties>{inside}</testcase>'


@pytest.fixture
def report(tmp_path):
    def write(*cases):
        path = tmp_path / 'report.xml'
        path.write_text(f'<testsuites><testsuite>{"".join(cases)}</testsuite></testsuites>')
        return {
            'rows': rows_of(path),
            'machine': dict(cpu='some', torch='2.11', date='today'),
            'versions': dict(onnx='1'),
        }

    return write


def test_the_worst_of_a_family_stands_in_its_row(report):
    text = table(
        report(
            case('a', 'mask_rcnn', {'options': {}, **BOXES}),
            case('b', 'mask_rcnn', {'options': {'format': 'aoti'}, **WORSE}),
            case('c', 'mask_rcnn', {'options': {'precision': 'fp16'}, **WORSE, 'unpaired': 1}),
            case('d', 'upernet', {'options': {}, **MAPS}),
        )
    )
    assert '4 tests passed, 0 failed, 0 were skipped.' in text
    assert '| mask_rcnn | 1 aoti, 1 onnx | 8 | 3.0e-05 px | 2.0e-07 | IoU 0.9990 |' in text
    assert '| mask_rcnn | onnx, fp16 | 4, 1 without a partner | 3.0e-05 px | 2.0e-07 | IoU 1.0000 |' in text
    assert '| upernet | 1 onnx |  |  |  | 99.950 % of the labels |' in text


def test_what_failed_is_named_and_has_no_figures(report):
    failed = case('broken', 'dino', {'options': {}, **BOXES}, '<failure message="no"/>')
    text = table(report(failed, case('refused', 'dino'), case('absent', inside='<skipped message="no"/>')))
    assert '1 tests passed, 1 failed, 1 were skipped (broken, absent).' in text
    assert '| dino |' not in text
