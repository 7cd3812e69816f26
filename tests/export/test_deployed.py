"""What is exported says in PyTorch what the model says: every family, images of two sizes in a batch."""

import pytest
import torch
from mmengine.registry import MODELS, init_default_scope

from mila_mm.engine import load_config
from mila_mm.errors import UserError
from mila_mm.export.api import load_model
from mila_mm.export.compare import TOLERANCES, Comparison, compare
from mila_mm.export.deployed import Deployed, example_inputs
from mila_mm.export.formats import check_next_size, smallest_side
from mila_mm.export.metadata import metadata, settings_of
from mila_mm.export.samples import contents, find_images, inputs_of, load_images, predict

DETECTORS = ['mask_rcnn', 'faster_rcnn', 'cascade_mask_rcnn', 'cascade_rcnn', 'retinanet', 'atss', 'rtmdet', 'dino']
SEGMENTORS = ['upernet', 'segformer', 'deeplabv3plus']


@pytest.mark.parametrize('name', ['mask_rcnn', 'cascade_rcnn', 'rtmdet'])
def test_nothing_is_found(ready, name):
    made = ready(name)
    key = 'score_thr' if name == 'rtmdet' else 'rcnn.score_thr'
    model, _ = load_model(load_config(made.config, [f'model.test_cfg.{key}=1.0']), made.checkpoint)
    deployed = Deployed(model).eval()
    with torch.no_grad():
        results = deployed(*example_inputs(deployed, 2, 96, 128))
    named = dict(zip(deployed.output_names, results, strict=True))
    assert named['count'].tolist() == [0, 0] and (named['labels'] == -1).all()
    assert all((named[key] == 0).all() for key in named if key != 'labels')


def compared(model, config, images, logits=False):
    """Compare a model with its exported form: one image alone, and two of different sizes in a batch."""
    deployed, cfg = Deployed(model, logits=logits).eval(), load_config(config)
    comparison = Comparison()
    for batch, shape in ((1, (96, 128)), (2, (128, 96))):
        pictures = load_images(find_images([str(images)], cfg, batch), batch, *shape)
        sizes = contents(deployed, batch, *shape)
        inputs = inputs_of(deployed, pictures, sizes)
        with torch.no_grad():
            results = deployed(*(torch.from_numpy(inputs[key]) for key in deployed.input_names))
        named = {key: x.numpy() for key, x in zip(deployed.output_names, results, strict=True)}
        expected = predict(model, deployed.kind, pictures, sizes)
        compare(deployed.kind, named, expected, sizes, TOLERANCES['fp32'], settings_of(deployed), comparison)
    assert not comparison.faults and not comparison.unpaired
    return comparison


@pytest.mark.parametrize('pasted', [False, True])
@pytest.mark.parametrize('name', ['mask_rcnn', 'cascade_mask_rcnn'])
def test_masks_of_found_rows_are_those_of_all_rows(ready, name, pasted):
    """Also in a batch where rows between detections are empty, and where nothing is found at all."""
    made = ready(name)
    model, _ = load_model(load_config(made.config), made.checkpoint)
    few, every = (Deployed(model, pasted=pasted, every_row=asked).eval() for asked in (False, True))
    inputs = example_inputs(few, 3, 96, 128)
    with torch.no_grad():
        scores = few(*inputs)[1]
        for threshold in (float(scores[scores > 0].median()), 1.1):
            few.core.threshold = every.core.threshold = threshold
            results = [dict(zip(x.output_names, x(*inputs), strict=True)) for x in (few, every)]
            assert (0 < results[0]['count'].sum() < results[0]['labels'].numel()) == (threshold < 1)
            assert results[0]['masks'].any() == (threshold < 1)
            for key, values in results[0].items():
                assert values.dtype == results[1][key].dtype
                if values.dtype == torch.bool:  # a pixel may lie on the threshold
                    assert (values != results[1][key]).float().mean() < 1e-3
                else:
                    torch.testing.assert_close(values, results[1][key], rtol=0, atol=1e-5)


def test_a_preprocessor_at_the_top_of_a_config_is_used_as_in_training(ready):
    made = ready('retinanet')
    cfg = load_config(made.config)
    cfg.data_preprocessor = cfg.model.pop('data_preprocessor')
    model, _ = load_model(cfg, made.checkpoint)
    assert Deployed(model).preprocess.mean.flatten().tolist() == pytest.approx([123.675, 116.28, 103.53])


def test_a_two_stage_detector_without_a_neck(ready):
    made = ready('faster_rcnn')
    cfg = load_config(made.config)
    del cfg.model['neck']
    cfg.model.backbone.out_indices = (3,)
    cfg.model.rpn_head.in_channels = cfg.model.roi_head.bbox_roi_extractor.out_channels = 256
    cfg.model.rpn_head.anchor_generator.update(strides=[32], scales=[4])
    cfg.model.roi_head.bbox_roi_extractor.featmap_strides = [32]
    cfg.model.roi_head.bbox_head.in_channels = 256
    init_default_scope('mmdet')
    deployed = Deployed(MODELS.build(cfg.model).eval())
    with torch.no_grad():
        assert deployed(*example_inputs(deployed, 1, 96, 128))[0].shape == (1, 20, 4)


def test_names_come_from_the_checkpoint(ready, tmp_path):
    made = ready('retinanet')
    names = ('ant', 'bee', 'cat', 'dog', 'eel', 'fox')
    content = {**torch.load(made.checkpoint), 'meta': {'dataset_meta': {'classes': names, 'palette': None}}}
    torch.save(content, tmp_path / 'named.pth')
    cfg = load_config(made.config)
    for checkpoint, first in ((made.checkpoint, 'circle'), (tmp_path / 'named.pth', 'ant')):
        model, _ = load_model(cfg, str(checkpoint))
        deployed = Deployed(model)
        about = metadata(cfg, model.dataset_meta, deployed, made.config, settings_of(deployed), batch=1)
        assert about['classes'][0] == first and about['config'] == 'retinanet.py' and about['batch'] == 1


def test_a_segmentor_that_is_tested_in_windows_takes_whole_images_and_says_so(ready):
    made = ready('segformer')
    windows = ['model.test_cfg.mode=slide', 'model.test_cfg.crop_size=(64,64)', 'model.test_cfg.stride=(32,32)']
    model, notes = load_model(load_config(made.config, windows), made.checkpoint)
    assert notes == ['the config tests in sliding windows; the file takes each image as a whole']
    assert compared(model, made.config, made.images).pixels > 0.999


@pytest.mark.parametrize('least', [64, 160, 320, 1000])
def test_the_smallest_side_is_the_first_that_a_graph_takes(ready, least):
    made = ready('classifier')
    deployed = Deployed(load_model(load_config(made.config), made.checkpoint)[0])

    def run(image):
        if image.shape[1] < least:
            raise AssertionError('Guard failed')

    assert smallest_side(run, deployed, 1, True) == min(least, 320)
    assert smallest_side(run, deployed, 1, False) is None


def test_a_graph_that_takes_even_numbers_of_cells_alone_is_refused(ready):
    made = ready('classifier')
    deployed = Deployed(load_model(load_config(made.config), made.checkpoint)[0])

    def run(image):
        assert image.shape[1] % 64 == 0, 'Guard failed'

    check_next_size(run, deployed, 1, None)
    check_next_size(lambda image: None, deployed, 1, 64)
    with pytest.raises(UserError, match=r'^export: .*64 x 64, and not of 96 x 96; export it without --dynamic'):
        check_next_size(run, deployed, 1, 64)


@pytest.mark.parametrize('name', [*DETECTORS, *SEGMENTORS, 'classifier'])
def test_the_exported_form_is_the_model(ready, name):
    made = ready(name)
    model, _ = load_model(load_config(made.config), made.checkpoint)
    comparison = compared(model, made.config, made.images, logits=name in SEGMENTORS)
    if name in DETECTORS:
        assert comparison.detections > 10
        assert (comparison.masks is not None) == ('mask' in name)
    if name in SEGMENTORS:
        assert comparison.logits < 1e-4


ONE_CHANNEL = ['model.decode_head.num_classes=2', 'model.decode_head.out_channels=1', 'model.auxiliary_head=None']


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


SOFTMAX = 'model.bbox_head.loss_cls={"_delete_":True,"type":"CrossEntropyLoss"}'


@pytest.mark.parametrize(
    ('name', 'options'),
    [
        ('fcos', []),
        ('mask_rcnn', ['model.roi_head.bbox_head.reg_class_agnostic=True']),
        ('mask_rcnn', ['model.roi_head.mask_head.class_agnostic=True']),
        ('mask_rcnn', ['model.roi_head.bbox_head.num_classes=1', 'model.roi_head.mask_head.num_classes=1']),
        ('mask_rcnn', ['model.test_cfg.rcnn.max_per_img=3', 'model.test_cfg.rcnn.score_thr=0.0']),
        slow('mask_rcnn', ['model.test_cfg.rcnn.mask_thr_binary=0.3', 'model.test_cfg.rcnn.nms.class_agnostic=True']),
        slow('faster_rcnn', ['model.rpn_head.loss_cls.use_sigmoid=False', 'model.test_cfg.rpn.min_bbox_size=8']),
        ('retinanet', ['model.bbox_head.num_classes=1']),
        slow('retinanet', [SOFTMAX]),
        ('retinanet', [SOFTMAX, 'model.bbox_head.num_classes=1']),
        ('retinanet', ['model.test_cfg.max_per_img=2', 'model.test_cfg.min_bbox_size=20']),
        slow('atss', ['model.bbox_head.num_classes=1', 'model.test_cfg.nms_pre=5']),
        slow('dino', ['model.bbox_head.num_classes=1', 'model.test_cfg.max_per_img=7']),
        ('segformer', ONE_CHANNEL[:2]),
        ('segformer', [*ONE_CHANNEL[:2], 'model.decode_head.threshold=0.0']),
        ('upernet', [*ONE_CHANNEL, 'model.decode_head.threshold=0.6']),
        slow('segformer', ['model.decode_head.num_classes=300']),
        slow('upernet', ['model.decode_head.align_corners=True']),
    ],
    ids=lambda x: '-'.join(y.rpartition('.')[2] for y in x) if isinstance(x, list) else x,
)
def test_other_settings_are_stated_too(fresh, shapes, name, options):
    config, model = fresh(name, *options)
    comparison = compared(model, config, shapes / 'images' / 'training', logits=name in SEGMENTORS)
    assert name in SEGMENTORS or comparison.detections >= 5
