"""Errors in a config while its parts are built."""

import json
from xml.etree import ElementTree

import pytest
from mmengine.registry import Registry

from mila_mm.engine.config.build_errors import building, fault_of_annotations, reading
from mila_mm.errors import UserError

PARTS = Registry('part')


@PARTS.register_module()
class Part:
    """Refuses numbers below zero, and has a bug at 13."""

    def __init__(self, number: int) -> None:
        if number < 0:
            raise ValueError(f'Part: expected number >= 0,\n got {number}')
        if number == 13:
            len(number)


@pytest.mark.parametrize(
    ('config', 'message'),
    [
        (dict(type='Part', number=-1), '^part: Part: expected number >= 0, got -1$'),
        (dict(type='Prat', number=1), '^part: Prat is not in the .*registry; did you mean .Part.\\?$'),
        (dict(type='Part', numbre=1), 'numbre'),
        (dict(type='Part'), "missing 1 required positional argument: 'number'"),
    ],
)
def test_mistakes(config, message) -> None:
    with pytest.raises(UserError, match=message), building('part'):
        PARTS.build(config)


def load_data_list(error: Exception) -> None:
    """Fail as a data set does while it reads its file."""
    raise error


def test_a_bug_inside_a_constructor_passes() -> None:
    with pytest.raises(TypeError, match='has no len'), building('part'):
        PARTS.build(dict(type='Part', number=13))


@pytest.mark.parametrize('error', [KeyError('x'), RuntimeError('y'), ZeroDivisionError()])
def test_other_errors_pass(error) -> None:
    with pytest.raises(type(error)), building('part'):
        raise error


def test_decoration_of_older_mmengine_is_dropped() -> None:
    message = 'class `MaskRCNN` in mmdet/models/x.py: class `MILA` in mila_mm/models/mila.py: unknown arch'
    with pytest.raises(UserError, match=r'^model: unknown arch$'), building('model'):
        raise ValueError(message)


def test_user_errors_pass_unchanged() -> None:
    with pytest.raises(UserError, match=r'^as it is$'), building('model'):
        raise UserError('as it is')


def test_reading_blames_the_broken_file(tmp_path) -> None:
    (tmp_path / 'sound.json').write_text(json.dumps(dict(images=[], annotations=[], categories=[])))
    (tmp_path / 'broken.json').write_text('{')
    files = [tmp_path / 'list.txt', tmp_path / 'sound.json', tmp_path / 'broken.json']
    with pytest.raises(UserError, match=r'broken\.json is not valid JSON'), reading('dataset', files):
        load_data_list(RuntimeError('whatever came of it'))


def test_reading_blames_no_file_for_a_mistake_elsewhere(tmp_path) -> None:
    (tmp_path / 'broken.json').write_text('{')
    with pytest.raises(UserError, match=r'^dataset: .*numbre'), reading('dataset', [tmp_path / 'broken.json']):
        PARTS.build(dict(type='Part', numbre=1))


def test_reading_of_sound_files_keeps_the_error(tmp_path) -> None:
    (tmp_path / 'sound.json').write_text(json.dumps(dict(images=[], annotations=[], categories=[])))
    with pytest.raises(RuntimeError, match='whatever'), reading('dataset', [tmp_path / 'sound.json']):
        raise RuntimeError('whatever')


@pytest.mark.parametrize(
    ('content', 'fault'),
    [
        (b'\xff\x00\xfe', 'it is not text'),
        (b'\xff\xfe\x00', 'is text in UTF-16, expected UTF-8'),
        (b'{"images": 3}', "no list 'images'"),
        (b'{"images": [], "annotations": [{"id": 1}], "categories": []}', r"annotations\[0\] has no 'image_id'"),
        (b'{"images": [], "annotations": [], "categories": ["a"]}', r"categories\[0\] has no 'id'"),
    ],
)
def test_faults_of_annotations(tmp_path, content, fault) -> None:
    path = tmp_path / 'a.json'
    path.write_bytes(content)
    with pytest.raises(AssertionError, match=fault):
        raise AssertionError(fault_of_annotations(path))


def test_missing_annotations_are_a_fault(tmp_path) -> None:
    assert 'cannot be read' in fault_of_annotations(tmp_path / 'nowhere.json')


def test_a_broken_xml_file_is_named() -> None:
    def read(xml_path: str) -> None:
        ElementTree.fromstring('<annotation>')

    told = r'^dataset: annotation file voc/1\.xml is not valid XML: no element found'
    with pytest.raises(UserError, match=told), building('dataset'):
        read('voc/1.xml')
