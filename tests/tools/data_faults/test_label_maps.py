"""Faults of label maps, and of a segmentor that learns from them, are said before the first step."""

import shutil
from collections.abc import Callable

import cv2
import numpy as np
import pytest
from PIL import Image

from mila_mm.engine.config.load import load_config
from mila_mm.engine.data.check import check_everything

TRAIN = 'train.py'


MAPS: dict[str, tuple[Callable[[np.ndarray, int], np.ndarray], list[str]]] = {
    'a value of no class': (lambda m, k: np.where(m > 0, 128, 0).astype(np.uint8), ['value 128', '0 to 2', '255']),
    'counted from 1': (lambda m, k: m + 1, ['value 3', 'counted from 1', 'reduce_zero_label']),
    'binary': (lambda m, k: np.where(m > 0, 255, 0).astype(np.uint8), ['0 and 255', 'no foreground']),
    'all ignored': (lambda m, k: np.full_like(m, 255), ['every pixel is ignored']),
    'RGB': (lambda m, k: np.stack([m * 90] * 3, -1), ['3 channels', 'index map']),
    'of another size': (lambda m, k: m[::2, ::2].copy(), ['32 x 32', '64 x 64', 'ann/', 'img/']),
    'JPEG': (lambda m, k: m, ['is a JPEG', 'as PNG']),
    '16 bit': (lambda m, k: m.astype(np.uint16) * 300, ['16 bit', '600']),
}


@pytest.mark.parametrize('fault', MAPS)
@pytest.mark.parametrize('splits', [('train', 'val'), ('val',)], ids=['both', 'val'])
def test_label_maps(command, refused, segmentor_of, tmp_path, maps, look, fault, splits) -> None:
    change, words = MAPS[fault]
    folder = maps(tmp_path / 'maps', change, splits)
    if fault == 'JPEG':
        for path in [path for split in splits for path in (folder / 'ann' / split).iterdir()]:
            Image.open(path).save(path, format='JPEG', quality=100)
    refused(command(TRAIN, segmentor_of(folder)), *words, lines=(1, 2, 3))


def test_label_maps_without_fault(command, segmentor_of, tmp_path, maps) -> None:
    ended = command(TRAIN, segmentor_of(maps(tmp_path / 'maps', lambda m, k: m)))
    assert ended.status == 0
    assert 'WARNING - data:' not in ended.out


def test_a_set_of_one_class_is_a_warning(command, segmentor_of, tmp_path, maps) -> None:
    ended = command(TRAIN, segmentor_of(maps(tmp_path / 'maps', lambda m, k: np.zeros_like(m))))
    assert ended.status == 0
    assert "'back' is the only class that occurs" in ended.out


def test_mostly_ignored_pixels_are_a_warning(command, segmentor_of, tmp_path, maps) -> None:
    def ignore(labels: np.ndarray, _: int) -> np.ndarray:
        labels[4:] = 255
        labels[0, :3] = 1
        return labels

    ended = command(TRAIN, segmentor_of(maps(tmp_path / 'maps', ignore)))
    assert '% of the pixels are ignored' in ended.out


def test_an_image_without_a_label_map(command, refused, segmentor_of, tmp_path, maps) -> None:
    folder = maps(tmp_path / 'maps', lambda m, k: m)
    (folder / 'ann/val/1.png').unlink()
    refused(command(TRAIN, segmentor_of(folder)), 'label map', 'ann/val/1.png', 'does not exist', lines=(1, 2, 3))


def test_images_of_a_suffix_that_is_not_read(command, segmentor_of, tmp_path, maps) -> None:
    folder = maps(tmp_path / 'maps', lambda m, k: m)
    cv2.imwrite(str(folder / 'img/train/9.jpg'), np.zeros((64, 64, 3), np.uint8))
    assert '1 images in' in command(TRAIN, segmentor_of(folder)).out


def test_a_softmax_over_one_class(command, refused, segmentor_of, tmp_path, maps) -> None:
    folder = maps(tmp_path / 'maps', lambda m, k: np.zeros_like(m))
    refused(command(TRAIN, segmentor_of(folder, "('road',)")), 'softmax', 'background', lines=(1, 2, 3))


def test_heads_of_another_number(command, refused, segmentor_of, tmp_path, maps) -> None:
    folder = maps(tmp_path / 'maps', lambda m, k: m)
    more = "model['auxiliary_head']['num_classes'] = 150"
    ended = command(TRAIN, segmentor_of(folder, more=more))
    refused(ended, 'model.auxiliary_head.num_classes is 150', '3 classes', 'auxiliary_head.num_classes=3')


@pytest.mark.parametrize('batch', [1, 4])
def test_batch_norm_of_one_value(command, refused, segmentor_of, tmp_path, batch, maps) -> None:
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


LISTS = {
    'with suffixes': (b'0.png\n1.png\n', "one name without '.png'"),
    'pairs': (b'0.png 0.png\n1.png 1.png\n', "one name without '.png'"),
    'a blank line': (b'0\n1\n\n', 'a blank line in ann_file?'),
    'a byte order mark': (b'\xef\xbb\xbf0\n1\n', 'begins with a byte order mark'),
    'empty': (b'', 'own.txt is empty'),
}


@pytest.mark.parametrize('fault', LISTS)
def test_lists_of_images(command, refused, segmentor_of, maps, tmp_path, fault) -> None:
    folder = maps(tmp_path / 'maps', lambda m, k: m)
    content, words = LISTS[fault]
    (folder / 'own.txt').write_bytes(content)
    config = segmentor_of(folder, more="train_dataloader['dataset']['ann_file'] = 'own.txt'")
    refused(command(TRAIN, config), words, lines=(1, 2, 3))


def test_a_list_with_the_line_ends_of_windows(segmentor_of, maps, tmp_path) -> None:
    folder = maps(tmp_path / 'maps', lambda m, k: m)
    (folder / 'own.txt').write_bytes(b'0\r\n1\r\n')
    more = "train_dataloader['dataset']['ann_file'] = 'own.txt'"
    cfg = load_config(str(segmentor_of(folder, more=more)))
    report = check_everything(cfg, ['train'], 'mmseg')
    assert not report.of('error') and report.counts['train_dataloader.dataset']['label_maps'] == 2


def test_no_image_of_that_suffix(command, refused, segmentor_of, maps, tmp_path) -> None:
    folder = maps(tmp_path / 'maps', lambda m, k: m)
    config = segmentor_of(folder, more="train_dataloader['dataset']['img_suffix'] = '.jpg'")
    refused(command(TRAIN, config), "img_suffix is '.jpg'", "3 files of '.png'", lines=(1, 2, 3))


@pytest.mark.parametrize('value', [255, 7])
def test_transforms_of_ones_own_have_the_last_word(segmentor_of, maps, tmp_path, monkeypatch, value) -> None:
    """Maps of 0 and 255 are right where a transform writes 255 as 1; what it leaves of no class is told."""
    folder = maps(tmp_path / 'maps', lambda m, k: np.where(m > 0, value, 0).astype(np.uint8))
    (tmp_path / 'own_binary.py').write_text(
        'from mmseg.registry import TRANSFORMS\n\n\n@TRANSFORMS.register_module(force=True)\nclass OwnBinary:\n'
        "    def __call__(self, results):\n        results['gt_seg_map'][results['gt_seg_map'] == 255] = 1\n"
        '        return results\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    more = (
        "custom_imports = dict(imports=['own_binary'])\nload = train_dataloader['dataset']['pipeline']\n"
        "train_dataloader['dataset']['pipeline'] = [*load[:2], dict(type='OwnBinary'), load[2]]\n"
    )
    cfg = load_config(str(segmentor_of(folder, "('back', 'road')", more)))
    found = [str(finding) for finding in check_everything(cfg, ['train'], 'mmseg').of('error')]
    wrong = ['train_dataloader.dataset.pipeline: gives labels 7, which no class has: the 2 classes are 0 to 1']
    assert found == ([] if value == 255 else wrong)


def test_images_that_indices_leave_out_are_not_told_to_have_another_suffix(segmentor_of, maps, tmp_path) -> None:
    folder = maps(tmp_path / 'maps', lambda m, k: m)

    def told(more: str) -> list[str]:
        report = check_everything(load_config(str(segmentor_of(folder, more=more))), ['train'], 'mmseg')
        return [finding.message for finding in report.findings if 'are not read' in finding.message]

    assert told("train_dataloader['dataset']['indices'] = 1") == []
    shutil.copy(folder / 'img/train/0.png', folder / 'img/train/9.jpeg')
    (message,) = told('')
    assert message.startswith('1 images in') and "img_suffix is '.png'" in message


@pytest.mark.parametrize('fault', [*MAPS, *LISTS, 'another suffix'])
def test_what_the_first_look_refuses_the_whole_check_refuses(refusals, segmentor_of, maps, tmp_path, fault) -> None:
    folder = maps(tmp_path / 'maps', MAPS[fault][0] if fault in MAPS else lambda m, k: m)
    more = "train_dataloader['dataset']['img_suffix'] = '.jpg'" if fault == 'another suffix' else ''
    if fault in LISTS:
        (folder / 'own.txt').write_bytes(LISTS[fault][0])
        more = "train_dataloader['dataset']['ann_file'] = 'own.txt'"
    if fault == 'JPEG':
        for path in (folder / 'ann/train').iterdir():
            Image.open(path).save(path, format='JPEG', quality=100)
    first, whole = refusals(segmentor_of(folder, more=more), ['train'])
    assert whole
    assert first
