"""What is wrong with one's own data is said before the first step, each kind by a small set with that fault."""

import ast
import importlib.util
import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from mila_mm import cli

TRAIN, TEST = 'train.py', 'test.py'
CASES = Path(__file__).resolve().parents[3] / 'shared' / 'cases'


@pytest.fixture(autouse=True)
def remembered_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep results of checks out of the user's cache."""
    monkeypatch.setenv('MILA_HOME', str(tmp_path / 'home'))


@pytest.fixture
def own(shapes: Path, tmp_path: Path) -> Path:
    """A copy of the shapes set for a test to damage."""
    return Path(shutil.copytree(shapes, tmp_path / 'own'))


@pytest.fixture
def detector_of(workspace: Path, request: pytest.FixtureRequest) -> Callable[..., Path]:
    """Write the detector's config for a data folder, with more lines."""
    text = request.getfixturevalue('detector').read_text()
    header, _, body = text.partition('ROOT = ')

    def write(data: Path, more: str = '') -> Path:
        path = workspace / 'own.py'
        path.write_text(f'{header}ROOT = {str(data)!r}\n{body.partition(chr(10))[2]}\n{more}\n')
        return path

    return write


@pytest.fixture
def segmentor_of(workspace: Path, shapes: Path, segmentor: Path) -> Callable[..., Path]:
    """Write the segmentor's config for a folder of its own: three classes, maps as they are."""

    def write(data: Path, classes: str = "('back', 'road', 'car')", more: str = '') -> Path:
        path = workspace / 'own_seg.py'
        text = segmentor.read_text().replace(str(shapes), str(data)).replace('reduce_zero_label=True, ', '')
        text = text.replace('num_classes=7', f'num_classes={len(ast.literal_eval(classes))}')
        start = text.index('classes = (')
        end = text.index('\n', start)
        splits = (
            "train_dataloader['dataset'] = dict(**dataset, data_prefix=dict(img_path='img/train', "
            "seg_map_path='ann/train'))\n"
            "val_dataloader['dataset'] = dict(**dataset, data_prefix=dict(img_path='img/val', "
            "seg_map_path='ann/val'))\n"
        )
        body = f'{text[:start]}classes = {classes}{text[end:]}'
        body = body.replace('test_dataloader = val_dataloader', f'{splits}test_dataloader = val_dataloader', 1)
        path.write_text(f'{body}\n{more}\n')
        return path

    return write


def edit(data: Path, change: Callable[[dict[str, Any]], Any], splits: tuple[str, ...] = ('train', 'val')) -> None:
    """Change the annotation files of a set."""
    for split in splits:
        path = data / f'annotations/instances_{split}.json'
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))


def each(**fields: Any) -> Callable[[dict[str, Any]], None]:
    """Set fields of every annotation; None takes the field away."""

    def change(content: dict[str, Any]) -> None:
        for annotation in content['annotations']:
            for name, value in fields.items():
                annotation.pop(name, None)
                if value is not None:
                    annotation[name] = value

    return change


def one(**fields: Any) -> Callable[[dict[str, Any]], None]:
    """Set fields of the annotation at position 1."""
    return lambda content: content['annotations'][1].update(fields)


def maps(
    folder: Path, change: Callable[[np.ndarray, int], np.ndarray], splits: tuple[str, ...] = ('train', 'val')
) -> Path:
    """Write three images and label maps a split, of values 0 to 2, changed in some splits."""
    rng = np.random.default_rng(0)
    for split in ('train', 'val'):
        for sub in ('img', 'ann'):
            (folder / sub / split).mkdir(parents=True)
        for number in range(3):
            labels = np.zeros((64, 64), np.uint8)
            labels[8:30, 8:50] = 1
            labels[40:60, 4:60] = 2
            cv2.imwrite(str(folder / 'img' / split / f'{number}.png'), rng.integers(0, 255, (64, 64, 3), np.uint8))
            labels = change(labels, number) if split in splits else labels
            cv2.imwrite(str(folder / 'ann' / split / f'{number}.png'), labels)
    return folder


def rename(content: dict[str, Any]) -> None:
    content['categories'][2]['name'] = 'Triangle '


def reverse(content: dict[str, Any]) -> None:
    content['categories'].reverse()


def fewer(content: dict[str, Any]) -> None:
    del content['categories'][3:]


def from_zero(content: dict[str, Any]) -> None:
    for annotation in content['annotations']:
        annotation['category_id'] -= 1


def as_text(content: dict[str, Any]) -> None:
    for annotation in content['annotations']:
        annotation['image_id'] = str(annotation['image_id'])


def half_the_size(content: dict[str, Any]) -> None:
    for image in content['images']:
        image.update(width=image['width'] // 2, height=image['height'] // 2)
    each(segmentation=[[5, 5, 20, 5, 20, 20]], bbox=[5, 5, 15, 15], area=100)(content)


ENTRIES = {
    'no masks': (each(segmentation=None), ['annotations[0].segmentation', 'missing', 'masks']),
    'an empty mask': (one(segmentation=[]), ['annotations[1].segmentation', '[]']),
    'a flat polygon': (one(segmentation=[1, 1, 9, 1, 9, 9]), ['annotations[1].segmentation', 'flat list']),
    'a polygon of text': (one(segmentation=[['1', '1', '9', '1', '9', '9']]), ['annotations[1].segmentation[0]']),
    'a mask of another size': (one(segmentation={'size': [9, 9], 'counts': [81]}), ['segmentation.size', '[9, 9]']),
    'runs that do not add up': (one(segmentation={'size': [64, 64], 'counts': [7]}), ['add up to 7', '64 * 64']),
    'text that is no runs': (one(segmentation={'size': [64, 64], 'counts': 'abc'}), ['counts', 'run-length']),
    'an empty box': (one(bbox=[]), ['annotations[1].bbox', '[]']),
    'a box of three': (one(bbox=[1, 2, 3]), ['annotations[1].bbox']),
    'a box of text': (one(bbox=['1', '2', '3', '4']), ['annotations[1].bbox']),
    'a box with NaN': (one(bbox=[1.0, float('nan'), 9.0, 9.0]), ['annotations[1].bbox', 'nan']),
    'an area of text': (one(area='big'), ['annotations[1].area']),
    'areas of 0': (each(area=0), ['no box is left', 'area 0']),
    'iscrowd of text': (one(iscrowd='no'), ['annotations[1].iscrowd']),
    'boxes outside': (each(bbox=[900, 900, 5, 5]), ['no box is left', 'outside']),
    'thin boxes': (each(bbox=[5, 5, 0.5, 0.5]), ['no box is left', 'less than a pixel']),
    'ids twice': (one(id=1), ['annotations[1].id 1']),
    'ids as text': (as_text, ["image_id '", 'of type int', 'of type str']),
    'categories from 0': (from_zero, ['].category_id', 'ids 0', 'shifted by one']),
    'size 0': (
        lambda content: [image.update(width=0, height=0) for image in content['images']],
        ['images[0]', 'width 0'],
    ),
    'size as text': (lambda content: content['images'][0].update(width='64'), ['images[0]', "'64'"]),
    'half the size': (half_the_size, ['64 x 64', '32 x 32', 'images/']),
    'images twice': (lambda content: content['images'].append(content['images'][0]), ['.id', 'another image']),
    'a renamed class': (rename, ["'triangle'", "nearest: 'Triangle '"]),
    'categories in another order': (reverse, ['another order', "'circle' here"]),
    'fewer categories': (fewer, ['3 of 6 classes', "'star'"]),
    'no categories': (lambda content: content.update(categories=[]), ["'categories' is empty"]),
    'other files': (
        lambda content: [image.update(file_name=f'{image["file_name"][:-4]}.jpg') for image in content['images']],
        ['does not exist', '.png'],
    ),
}


@pytest.mark.parametrize('fault', ENTRIES)
def test_annotation_files(command, refused, detector_of, own, fault) -> None:
    change, words = ENTRIES[fault]
    edit(own, change)
    refused(command(TRAIN, detector_of(own)), *words, lines=(1, 2, 3))


@pytest.mark.parametrize('fault', ['an empty box', 'fewer categories', 'areas of 0', 'half the size'])
def test_annotation_files_of_the_validation_alone(command, refused, detector_of, own, fault) -> None:
    change, words = ENTRIES[fault]
    edit(own, change, ('val',))
    refused(command(TRAIN, detector_of(own)), *words, 'val', lines=(1, 2, 3))


def test_absent_areas_and_crowds_are_computed_and_told(command, detector_of, own) -> None:
    edit(own, each(iscrowd=None, area=None))
    ended = command(TRAIN, detector_of(own))
    assert ended.status == 0, ended.err
    for words in ('annotations[0] has no "area"', 'annotations[0] has no "iscrowd"', 'instances_val.json'):
        assert words in ended.out
    assert 'coco/bbox_mAP' in ended.out  # the evaluation, which reads both


def test_a_byte_order_mark(command, refused, detector_of, own) -> None:
    path = own / 'annotations/instances_train.json'
    path.write_bytes(b'\xef\xbb\xbf' + path.read_bytes())
    refused(command(TRAIN, detector_of(own)), str(path), 'byte order mark', lines=(1, 2, 3))


def test_images_turned_by_exif(command, refused, detector_of, own) -> None:
    from PIL import Image

    for path in (own / 'images').rglob('*.png'):
        image = Image.open(path).resize((64, 48)).convert('RGB')
        exif = image.getexif()
        exif[274] = 6
        image.save(path, exif=exif)
    edit(own, lambda content: [image.update(width=64, height=48) for image in content['images']])
    edit(own, each(segmentation=[[5, 5, 20, 5, 20, 20]], bbox=[5, 5, 15, 15], area=100))
    refused(command(TRAIN, detector_of(own)), '48 x 64', '64 x 48', 'EXIF', lines=(1, 2, 3))


def test_lost_boxes_are_a_warning_that_says_how_many(command, detector_of, own) -> None:
    def half(content: dict[str, Any]) -> None:
        for annotation in content['annotations'][::2]:
            annotation['area'] = 0

    edit(own, half)
    ended = command(TRAIN, detector_of(own))
    assert ended.status == 0
    assert '% of the boxes' in ended.out
    assert 'area 0' in ended.out


def test_images_below_min_size_are_a_warning(command, detector_of, own) -> None:
    def shrink(content: dict[str, Any]) -> None:
        content['images'].append({**content['images'][0], 'id': 99, 'width': 64, 'height': 64})
        content['images'].append({**content['images'][0], 'id': 98, 'width': 20, 'height': 20})

    edit(own, shrink, ('train',))
    config = detector_of(own, "train_dataloader['dataset']['filter_cfg'] = dict(min_size=32)")
    assert 'filter_cfg.min_size (the smallest side of any is 20)' in command(TRAIN, config).out


CONFIGS = {
    'classes': ("train_dataloader['dataset']['classes'] = ('circle',)", ['metainfo=dict(classes=']),
    'CLASSES': (
        "train_dataloader['dataset']['metainfo'] = dict(CLASSES=classes)",
        ['metainfo.CLASSES', "written 'classes'"],
    ),
    'a string of classes': ("train_dataloader['dataset']['metainfo'] = dict(classes=('circle'))", ['is the string']),
    'classes twice': (
        "train_dataloader['dataset']['metainfo'] = dict(classes=(*classes[:-1], 'circle'))",
        ["'circle' more than once"],
    ),
    'another order': (
        "val_dataloader['dataset']['metainfo'] = dict(classes=classes[::-1])",
        ['val_dataloader.dataset', 'another order'],
    ),
    'other classes': (
        "val_dataloader['dataset']['metainfo'] = dict(classes=classes[:3])",
        ['names 3 classes', "'star'"],
    ),
    'a string for data_prefix': (
        "train_dataloader['dataset'].update(_delete_=True, type='CocoDataset', data_prefix='images/training')",
        ["expected dict(img='images/training')"],
    ),
    "mmseg's data_prefix": (
        "train_dataloader['dataset'].update(_delete_=True, type='CocoDataset', "
        "data_prefix=dict(img_path='images/training'))",
        ["no 'img'"],
    ),
    'samples_per_gpu': ("train_dataloader['samples_per_gpu'] = 2", ['train_dataloader.samples_per_gpu', 'batch_size']),
    'img_scale': (
        "train_dataloader['dataset']['pipeline'][2] = dict(type='Resize', img_scale=(64, 64))",
        ['img_scale'],
    ),
    'another file of the metric': (
        "val_evaluator = dict(ann_file=ROOT + '/annotations/instances_train.json')",
        ['instances_train.json', 'instances_val.json', 'must be one file'],
    ),
    'heads of COCO': (
        'model["roi_head"]["bbox_head"]["num_classes"] = 80\nmodel["roi_head"]["mask_head"].pop("num_classes")',
        ['bbox_head.num_classes is 80', 'mask_head.num_classes is 80', '6 classes', 'mask_head.num_classes=6'],
    ),
    'a neck of another size': (
        "model['backbone']['arch'] = 'tiny'",
        ['MILA tiny gives 64, 128, 256, 512', 'model.neck.in_channels is 32, 64, 128, 256'],
    ),
    'half a validation': ('val_evaluator = None', ['val_evaluator is missing', 'half a validation']),
    'a path of results that is a file': (
        "val_evaluator['outfile_prefix'] = __import__('os').path.abspath('own.py') + '/x'",
        ['outfile_prefix', 'is a file'],
    ),
    'format_only': ("val_evaluator['format_only'] = True", ['outfile_prefix', 'format_only']),
    'an absent package': (
        "train_dataloader['dataset']['pipeline'].insert(2, dict(type='InstaBoost'))",
        ['InstaBoost', 'pip install instaboostfast'],
    ),
    'an unknown transform': (
        "train_dataloader['dataset']['pipeline'][2] = dict(type='Rezise', scale=(64, 64))",
        ['Rezise is not in', "did you mean 'Resize'?"],
    ),
    'an unknown argument': (
        "train_dataloader['dataset']['pipeline'][2] = dict(type='Resize', scale=(64, 64), keep_ratoi=True)",
        ["Resize does not take 'keep_ratoi'", "'keep_ratio'"],
    ),
    'an argument that is handed up': (
        "model['roi_head']['bbox_head']['num_clases'] = 6",
        ["'num_clases'", "'num_classes'"],
    ),
    'an argument of a dataset': ("train_dataloader['dataset']['test_mod'] = True", ["'test_mod'", "'test_mode'"]),
    'an argument of a hook': (
        "custom_hooks = [dict(type='EMAHook', momentun=0.1)]",
        ["'momentun'", 'EMAHook'],
    ),
    'a value that a neck asserts': (
        "model['neck']['in_channels'] = 32",
        ['FPN', 'assert isinstance(in_channels, list)'],
    ),
    'a validation pipeline that fails': (
        "val_dataloader['dataset']['pipeline'][1] = dict(type='Resize', scale_factor='much', keep_ratio=True)",
        ['Resize'],
    ),
}


@pytest.mark.parametrize('fault', CONFIGS)
def test_configs(command, refused, detector_of, shapes, fault) -> None:
    more, words = CONFIGS[fault]
    refused(command(TRAIN, detector_of(shapes, more)), *words, lines=(1, 2, 3))


def test_a_sound_file_in_another_layout_is_not_blamed(command, refused, detector_of, own) -> None:
    content = json.loads((own / 'annotations/instances_train.json').read_text())
    items = [
        dict(
            img_path=image['file_name'],
            height=64,
            width=64,
            instances=[dict(bbox=[5, 5, 40, 40], bbox_label=0, ignore_flag=0, mask=[[5, 5, 40, 5, 40, 40]])],
        )
        for image in content['images']
    ]
    (own / 'own.json').write_text(json.dumps(dict(metainfo=dict(classes=['circle']), data_list=items)))
    change = (
        "data = dict(data_root=ROOT, metainfo=dict(classes=classes))\ntrain_dataloader['batch_sampler'] = None\n"
        "train_dataloader['dataset'] = dict(_delete_=True, type='BaseDetDataset', **data, ann_file='own.json', "
        "data_prefix=dict(img_path='images/training'), "
        "pipeline=[load[0], labels, load[1], dict(type='PackDetInputs')])\n"
    )
    ended = command(TRAIN, detector_of(own, f'load[1]["keep_ratoi"] = True\n{change}'))
    refused(ended, 'keep_ratoi', lines=(1, 2, 3))
    assert 'own.json' not in ended.err
    assert command(TRAIN, detector_of(own, change)).status == 0
    items[0]['instances'][0]['bbox_label'] = 6
    (own / 'own.json').write_text(json.dumps(dict(metainfo=dict(classes=['circle']), data_list=items)))
    refused(command(TRAIN, detector_of(own, change)), 'sample 0', 'bbox_label is 6', '0 to 5', lines=(1, 2, 3))


def test_old_configs_are_told_so(command, refused, workspace) -> None:
    Path('old.py').write_text(
        "model = dict(type='MaskRCNN')\ndata = dict(samples_per_gpu=2)\noptimizer = dict(type='SGD')\n"
        "runner = dict(type='EpochBasedRunner')\n"
    )
    refused(command(TRAIN, 'old.py'), 'mmdet 2', 'data, optimizer, runner', 'train_dataloader')


MAPS: dict[str, tuple[Callable[[np.ndarray, int], np.ndarray], list[str]]] = {
    'a value of no class': (lambda m, k: np.where(m > 0, 128, 0).astype(np.uint8), ['value 128', '0 to 2', '255']),
    'counted from 1': (lambda m, k: m + 1, ['value 3', 'counted from 1', 'reduce_zero_label']),
    'binary': (lambda m, k: np.where(m > 0, 255, 0).astype(np.uint8), ['0 and 255', 'no foreground']),
    'all ignored': (lambda m, k: np.full_like(m, 255), ['every pixel is ignored']),
    'RGB': (lambda m, k: np.stack([m * 90] * 3, -1), ['3 channels', 'index map']),
    'of another size': (lambda m, k: m[::2, ::2].copy(), ['32 x 32', '64 x 64', 'ann/', 'img/']),
    '16 bit': (lambda m, k: m.astype(np.uint16) * 300, ['16 bit', '600']),
}


@pytest.mark.parametrize('fault', MAPS)
@pytest.mark.parametrize('splits', [('train', 'val'), ('val',)], ids=['both', 'val'])
def test_label_maps(command, refused, segmentor_of, tmp_path, fault, splits) -> None:
    change, words = MAPS[fault]
    refused(command(TRAIN, segmentor_of(maps(tmp_path / 'maps', change, splits))), *words, lines=(1, 2, 3))


def test_label_maps_without_fault(command, segmentor_of, tmp_path) -> None:
    ended = command(TRAIN, segmentor_of(maps(tmp_path / 'maps', lambda m, k: m)))
    assert ended.status == 0
    assert 'WARNING - data:' not in ended.out


def test_a_set_of_one_class_is_a_warning(command, segmentor_of, tmp_path) -> None:
    ended = command(TRAIN, segmentor_of(maps(tmp_path / 'maps', lambda m, k: np.zeros_like(m))))
    assert ended.status == 0
    assert "'back' is the only class that occurs" in ended.out


def test_mostly_ignored_pixels_are_a_warning(command, segmentor_of, tmp_path) -> None:
    def ignore(labels: np.ndarray, _: int) -> np.ndarray:
        labels[4:] = 255
        labels[0, :3] = 1
        return labels

    ended = command(TRAIN, segmentor_of(maps(tmp_path / 'maps', ignore)))
    assert '% of the pixels are ignored' in ended.out


def test_an_image_without_a_label_map(command, refused, segmentor_of, tmp_path) -> None:
    folder = maps(tmp_path / 'maps', lambda m, k: m)
    (folder / 'ann/val/1.png').unlink()
    refused(command(TRAIN, segmentor_of(folder)), 'label map', 'ann/val/1.png', 'does not exist', lines=(1, 2, 3))


def test_images_of_a_suffix_that_is_not_read(command, segmentor_of, tmp_path) -> None:
    folder = maps(tmp_path / 'maps', lambda m, k: m)
    cv2.imwrite(str(folder / 'img/train/9.jpg'), np.zeros((64, 64, 3), np.uint8))
    assert '1 images in' in command(TRAIN, segmentor_of(folder)).out


def test_a_softmax_over_one_class(command, refused, segmentor_of, tmp_path) -> None:
    folder = maps(tmp_path / 'maps', lambda m, k: np.zeros_like(m))
    refused(command(TRAIN, segmentor_of(folder, "('road',)")), 'softmax', 'background', lines=(1, 2, 3))


def test_heads_of_another_number(command, refused, segmentor_of, tmp_path) -> None:
    folder = maps(tmp_path / 'maps', lambda m, k: m)
    more = "model['auxiliary_head']['num_classes'] = 150"
    ended = command(TRAIN, segmentor_of(folder, more=more))
    refused(ended, 'model.auxiliary_head.num_classes is 150', '3 classes', 'auxiliary_head.num_classes=3')


@pytest.mark.parametrize('batch', [1, 4])
def test_batch_norm_of_one_value(command, refused, segmentor_of, tmp_path, batch) -> None:
    folder = maps(tmp_path / 'maps', lambda m, k: m)
    more = f"train_dataloader['batch_size'] = {batch}"
    if batch > 1:  # one image is left for the last batch of an epoch
        (folder / 'img/train').rename(folder / 'img/old')
        shutil.rmtree(folder / 'ann/train')
        for sub in ('img', 'ann'):
            (folder / sub / 'train').mkdir()
            for number in range(5):
                shutil.copy(folder / sub / 'val' / '0.png', folder / sub / 'train' / f'{number}.png')
        more += "\ntrain_dataloader['sampler'] = dict(type='DefaultSampler', shuffle=True)\n"
        more += 'train_cfg = dict(_delete_=True, by_epoch=True, max_epochs=1)\nparam_scheduler = []\n'
        more += 'default_hooks = dict(checkpoint=dict(by_epoch=True), logger=dict(log_metric_by_epoch=True))\n'
    ended = command(TRAIN, segmentor_of(folder, more=more))
    refused(ended, 'psp_modules', 'BatchNorm sees one value', 'batch_size', lines=(1, 2))


def test_no_check_starts_anyway(command, detector_of, own) -> None:
    edit(own, half_the_size)
    assert command(TRAIN, detector_of(own), '--no-check').status == 0


def test_a_test_is_checked_too(command, refused, detector_of, own, trained_detector) -> None:
    edit(own, rename, ('val',))
    refused(command(TEST, detector_of(own), trained_detector), "'triangle'", 'test_dataloader', lines=(1, 2, 3))


def test_a_second_start_does_not_read_the_file_again(command, detector_of, own, monkeypatch) -> None:
    from mila_mm.engine.data import files

    assert command(TRAIN, detector_of(own), '--cfg-options', 'train_cfg.max_epochs=1').status == 0

    def fail(_: Path) -> None:
        raise AssertionError('read again')

    monkeypatch.setattr(files, 'read_coco', fail)
    assert command(TRAIN, detector_of(own)).status == 0
    edit(own, one(bbox=[1, 2, 3]), ('train',))
    with pytest.raises(AssertionError, match='read again'):
        command(TRAIN, detector_of(own))


def shared_cases() -> dict[str, tuple[str, str, Callable[[Path], str]]]:
    """Read the cases that lie beside the checkout, none where there are none."""
    if not (CASES / 'make.py').is_file():
        return {}
    spec = importlib.util.spec_from_file_location('shared_cases', CASES / 'make.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.CASES


@pytest.mark.skipif(not shared_cases(), reason=f'no {CASES}')
@pytest.mark.parametrize('name', shared_cases() or [''])
def test_shared_cases(command, workspace, monkeypatch, root, name) -> None:
    situation, right, write = shared_cases()[name]
    monkeypatch.setenv('CASES_PROJECT', str(root))
    words = shlex.split(write(workspace))
    ended = command(words[0].removeprefix('tools/'), *words[1:])
    if situation.startswith('control'):
        assert ended.status == 0, ended.err
        return
    assert ended.status in (0, cli.EXIT_USER_ERROR), ended.err
    if ended.status:
        assert 0 < len(ended.err.strip().splitlines()) <= 3, ended.err
        assert 'Traceback' not in ended.err
    else:
        assert 'WARNING - data:' in ended.out, right
