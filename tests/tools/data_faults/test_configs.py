"""What a config says of its data is checked before the first step, and not where the check is left out."""

import importlib.util
import json
from pathlib import Path

import pytest

from mila_mm.engine.config.load import load_config
from mila_mm.engine.data.splits import splits_of
from mila_mm.engine.data.static import check_static

TRAIN, TEST = 'train.py', 'test.py'


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
    'regions of another width': (
        "model['roi_head']['bbox_roi_extractor']['out_channels'] = 64",
        ['model.roi_head.bbox_roi_extractor.out_channels: is 64', 'model.neck gives maps of 16 channels'],
    ),
    'proposals of another width': (
        "model['rpn_head']['in_channels'] = 256",
        ['model.rpn_head.in_channels: is 256', '--cfg-options model.rpn_head.in_channels=16'],
    ),
    'a list of dataloaders': ('val_dataloader = [val_dataloader]', ['val_dataloader: is a list', 'ConcatDataset']),
    'a pipeline that leaves no sample': (
        "train_dataloader['dataset']['pipeline'].insert(3, dict(type='FilterAnnotations', min_gt_bbox_wh=(900, 900)))",
        ['train_dataloader.dataset.pipeline: leaves no sample'],
    ),
    'a mix that fails': (
        "single = dict(type='CocoDataset', **train_dataloader['dataset'])\n"
        "steps = single['pipeline']\nsingle['pipeline'] = steps[:2]\n"
        "mix = [dict(type='Mosaic', img_scale=(32, 32)), steps[3]]\n"
        "train_dataloader['dataset'] = dict(_delete_=True, type='MultiImageMixDataset', dataset=single, pipeline=mix)",
        ['sample 0', 'PackDetInputs fails with IndexError'],  # Mosaic leaves masks as they were
    ),
    'a list of files': (
        "train_dataloader['dataset']['ann_file'] = ['annotations/a.json', 'annotations/b.json']",
        ['train_dataloader.dataset.ann_file: names 2 files', 'ConcatDataset'],
    ),
    'a list for metainfo': (
        "train_dataloader['dataset'].update(_delete_=True, type='CocoDataset', metainfo=list(classes))",
        ['train_dataloader.dataset.metainfo: is [', "expected dict(classes=('a', 'b')"],
    ),
    'masks of a model without': (
        "model['roi_head'].update(mask_head=None, mask_roi_extractor=None)",
        ["val_evaluator.metric: asks for 'segm'", 'predicts no masks'],
    ),
    'an unknown figure': ("val_evaluator['metric'] = 'bbx'", ["val_evaluator.metric: has 'bbx'", "'proposal_fast'"]),
    'a metric of an absent package': (
        "val_evaluator['type'] = 'FasterCocoMetric'",
        ['val_evaluator: FasterCocoMetric needs faster_coco_eval', 'pip install faster-coco-eval'],
    ),
    'an unknown size': ("model['backbone']['arch'] = 'huge'", ['expected arch to be one of nano', "got 'huge'"]),
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
    'an unknown optimizer': (
        "optim_wrapper = dict(optimizer=dict(_delete_=True, type='AdamWW', lr=0.1))",
        ['optim_wrapper.optimizer: there is no AdamWW', "did you mean 'AdamW'?"],
    ),
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


@pytest.fixture(autouse=True)
def without_faster_coco_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it is installed or not."""
    found = importlib.util.find_spec
    absent = 'faster_coco_eval'
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name, *rest: None if name == absent else found(name, *rest))


@pytest.mark.parametrize('fault', CONFIGS)
def test_configs(command, refused, detector_of, shapes, look, fault) -> None:
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


def test_no_check_starts_anyway(command, detector_of, own, edit) -> None:
    edit(own, lambda content: [image.update(width=32, height=32) for image in content['images']])
    assert command(TRAIN, detector_of(own), '--no-check').status == 0


def test_a_test_is_checked_too(command, refused, detector_of, own, trained_detector, edit) -> None:
    edit(own, lambda content: content['categories'][2].update(name='Triangle '), ('val',))
    refused(command(TEST, detector_of(own), trained_detector), "'triangle'", 'test_dataloader', lines=(1, 2, 3))


def test_a_second_start_does_not_read_the_file_again(command, detector_of, own, monkeypatch, edit) -> None:
    from mila_mm.engine.data import files

    assert command(TRAIN, detector_of(own), '--cfg-options', 'train_cfg.max_epochs=1').status == 0

    def fail(_: Path) -> None:
        raise AssertionError('read again')

    monkeypatch.setattr(files, 'read_coco', fail)
    assert command(TRAIN, detector_of(own)).status == 0
    edit(own, lambda content: content['annotations'][1].update(bbox=[1, 2, 3]), ('train',))
    with pytest.raises(AssertionError, match='read again'):
        command(TRAIN, detector_of(own))


def test_a_validation_on_training_images_is_a_warning(detector_of, shapes) -> None:
    more = (
        "val_dataloader['dataset'].update(ann_file='annotations/instances_train.json', "
        "data_prefix=dict(img='images/training'))\n"
        "val_evaluator['ann_file'] = ROOT + '/annotations/instances_train.json'\n"
    )
    for text, number in (('', 0), (more, 1)):
        cfg = load_config(str(detector_of(shapes, text)))
        found = check_static(cfg, ['train', 'val'], 'mmdet', splits_of(cfg, ['train', 'val'], 'mmdet'))
        told = [str(finding) for finding in found if finding.level == 'warning']
        assert len(told) == number
        assert all('reads the same files as train_dataloader.dataset' in line for line in told)


def test_what_the_first_look_refuses_the_whole_check_refuses(refusals, detector_of, shapes) -> None:
    for more, _ in CONFIGS.values():
        refusals(detector_of(shapes, more), ['train', 'val'])
