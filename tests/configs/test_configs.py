"""Every shipped config: its recipe, and one training step, prediction and evaluation of a shrunken copy."""

import json
from pathlib import Path

import cv2
import pytest
import yaml
from mmdet.datasets import CocoDataset
from mmengine.config import Config, ConfigDict

import mila_mm.engine
from mila_mm.datasets.shapes import write_shapes

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted(
    p.relative_to(ROOT / 'configs').as_posix()
    for p in (ROOT / 'configs').rglob('*.py')
    if not {'_base_', 'scale', 'imagenet', 'study', 'swapped', 'study_nano_shapes.py'} & set(p.parts)
)
PAPER = [c for c in CONFIGS if '/' not in c and 'layer_decay' not in c]
WIDTHS = {'tiny': [64, 128, 256, 512], 'small': [64, 128, 256, 512], 'base': [96, 192, 384, 768]}


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """The shapes set twice: under COCO's names and files, and under ADE20K's."""
    folder = tmp_path_factory.mktemp('data')
    shapes = write_shapes(folder / 'shapes', num_train=4, num_val=2, size=64, seed=0)
    for split, coco in (('train', 'train2017'), ('val', 'val2017')):
        annotations = json.loads((shapes / 'annotations' / f'instances_{split}.json').read_text())
        # All of COCO's categories, as in its own files; the shapes take the first ones.
        names = CocoDataset.METAINFO['classes']
        annotations['categories'] = [dict(id=i, name=name) for i, name in enumerate(names, start=1)]
        (folder / 'coco' / 'annotations').mkdir(parents=True, exist_ok=True)
        (folder / 'coco' / 'annotations' / f'instances_{coco}.json').write_text(json.dumps(annotations))
        source = shapes / 'images' / ('training' if split == 'train' else 'validation')
        (folder / 'coco' / coco).symlink_to(source)
        (folder / 'ade' / 'images' / source.name).mkdir(parents=True)
        for image in source.iterdir():
            cv2.imwrite(str(folder / 'ade' / 'images' / source.name / f'{image.stem}.jpg'), cv2.imread(str(image)))
    (folder / 'ade' / 'annotations').symlink_to(shapes / 'annotations')
    return folder


def shrink_sizes(node):
    """Divide every size of the data pipelines by 8."""

    def divide(size):
        return [divide(s) for s in size] if isinstance(size, (list, tuple)) else max(size // 8, 8)

    if isinstance(node, dict):
        for key, value in node.items():
            if key in ('scale', 'scales', 'crop_size'):
                shrunk = divide(value)
                node[key] = tuple(shrunk) if key != 'scales' else [tuple(s) for s in shrunk]
            else:
                shrink_sizes(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            shrink_sizes(value)


def replace(node, old, new):
    """Replace ``old`` by ``new`` in every string below a node."""
    if isinstance(node, dict):
        return {k: replace(v, old, new) for k, v in node.items()}
    if isinstance(node, (list, tuple)):
        return type(node)(replace(v, old, new) for v in node)
    return node.replace(old, new) if isinstance(node, str) else node


def shrink(cfg, data):
    """The same config with a narrow model from random weights and small images; nothing else changes."""
    model = cfg.model
    model.backbone.init_cfg = None
    widths = [16, 32, 64, 128]
    arch = model.backbone.arch
    model.backbone.arch = dict(embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))
    if 'neck' in model:
        assert model.neck.in_channels == WIDTHS.get(arch, model.neck.in_channels)
        model.neck.in_channels = widths
        model.train_cfg.rpn_proposal.update(nms_pre=50, max_per_img=20)
        model.test_cfg.rpn.update(nms_pre=50, max_per_img=20)
        model.test_cfg.rcnn.score_thr = 0.0  # after one step no score is high
    else:
        assert model.decode_head.in_channels == WIDTHS.get(arch, model.decode_head.in_channels)
        model.decode_head.update(in_channels=widths, channels=16)
        model.auxiliary_head.update(in_channels=widths[2], channels=16)
    for loader in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        if not cfg.filename.endswith('shapes.py'):
            shrink_sizes(cfg[loader].dataset.pipeline)
        cfg[loader].update(num_workers=0, persistent_workers=False)
        for old, new in (
            ('data/coco', data / 'coco'),
            ('data/ade/ADEChallengeData2016', data / 'ade'),
            ('data/shapes', data / 'shapes'),
        ):
            cfg[loader] = ConfigDict(replace(cfg[loader].to_dict(), old, str(new)))
            for evaluator in ('val_evaluator', 'test_evaluator'):
                cfg[evaluator] = replace(cfg[evaluator], old, str(new))
    if model.data_preprocessor.get('size'):
        model.data_preprocessor.size = (64, 64)
    cfg.train_dataloader.batch_size = 2


@pytest.mark.parametrize('name', CONFIGS)
def test_trains_predicts_and_evaluates(name, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = Config.fromfile(ROOT / 'configs' / name)
    shrink(cfg, data)
    cfg.work_dir = str(tmp_path)
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=1, val_interval=1)
    cfg.default_hooks.checkpoint = dict(type='CheckpointHook', by_epoch=False, interval=1)
    cfg.log_processor = dict(type='LogProcessor', by_epoch=False)
    shrunken = tmp_path / 'shrunken.py'
    cfg.dump(shrunken)
    runner = mila_mm.engine.train(str(shrunken), work_dir=str(tmp_path / 'run'))
    history = runner.message_hub.log_scalars
    loss = history['train/loss'].current()
    assert 0 < loss < 1e4, 'a finite loss of one training step'
    metric = 'val/coco/bbox_mAP' if 'mask_rcnn' in name else 'val/mIoU'
    assert -1 <= history[metric].current() <= 100, 'predictions of the held-out images were evaluated'
    assert (tmp_path / 'run' / 'iter_1.pth').is_file()
    assert any(
        v.abs().sum() > 0 for k, v in runner.optim_wrapper.optimizer.state_dict()['state'][0].items() if k == 'exp_avg'
    ), 'the optimizer has moved'


@pytest.mark.parametrize('name', [c for c in PAPER if c.startswith('mask_rcnn')])
def test_detection_recipe(name):
    cfg = Config.fromfile(ROOT / 'configs' / name)
    assert cfg.model.backbone.type == 'mila_mm.MILA'
    assert cfg.model.backbone.drop_path_rate == (0.3 if '3x' in name else 0.1)
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ('AdamW', 1e-4, 0.05)
    assert tuple(optimizer.betas) == (0.9, 0.999) and 'momentum' not in optimizer
    assert cfg.optim_wrapper.type == 'OptimWrapper' and not cfg.optim_wrapper.get('clip_grad')
    assert cfg.optim_wrapper.paramwise_cfg.custom_keys == {'norm': {'decay_mult': 0.0}}
    epochs, steps = (36, [27, 33]) if '3x' in name else (12, [8, 11])
    warmup, decay = cfg.param_scheduler
    assert (warmup.type, warmup.start_factor, warmup.end, warmup.by_epoch) == ('LinearLR', 0.001, 500, False)
    assert cfg.train_cfg.max_epochs == epochs and decay.milestones == steps and decay.end == epochs
    scales = [s for t in flatten(cfg.train_dataloader.dataset.pipeline) for s in t.get('scales', ())]
    if 'single_scale' in name:
        assert scales == []
    else:
        assert [s[0] for s in scales[:11]] == [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800]
        assert (400, 1333) in [tuple(s) for s in scales] and {s[1] for s in scales} == {1333}
        crops = [t for t in flatten(cfg.train_dataloader.dataset.pipeline) if t.type == 'RandomCrop']
        assert [(tuple(c.crop_size), c.crop_type) for c in crops] == [((384, 600), 'absolute_range')]
    assert cfg.train_dataloader.batch_size == 2 and cfg.model.data_preprocessor.pad_size_divisor == 32


@pytest.mark.parametrize('name', [c for c in PAPER if c.startswith('upernet')])
def test_segmentation_recipe(name):
    cfg = Config.fromfile(ROOT / 'configs' / name)
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ('AdamW', 6e-5, 0.01)
    assert cfg.model.decode_head.num_classes == cfg.model.auxiliary_head.num_classes == 150
    assert cfg.model.auxiliary_head.in_channels == cfg.model.decode_head.in_channels[2]
    assert cfg.train_cfg.max_iters == 160000 and cfg.train_dataloader.batch_size == 2
    warmup, decay = cfg.param_scheduler
    assert (warmup.start_factor, warmup.end) == (1e-6, 1500)
    assert (decay.type, decay.power, decay.begin, decay.end) == ('PolyLR', 1.0, 1500, 160000)
    assert cfg.model.test_cfg.mode == 'whole'
    tta = next(t for t in cfg.tta_pipeline if t.type == 'TestTimeAug')
    assert [t.scale_factor for t in tta.transforms[0]] == [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]
    assert {t.prob for t in tta.transforms[1]} == {0.0, 1.0}
    if '_b_' in name:
        assert cfg.model.backbone.drop_path_rate == 0.5


def flatten(pipeline):
    """All transforms of a pipeline, those inside of RandomChoice included."""
    for transform in pipeline:
        if isinstance(transform, (list, tuple)):
            yield from flatten(transform)
        else:
            yield transform
            yield from flatten(transform.get('transforms', ()))


def test_metafile_names_every_config_and_marks_published_results():
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text())
    models = [m for f in index['Import'] for m in yaml.safe_load((ROOT / f).read_text())['Models']]
    assert sorted(m['Config'] for m in models) == [f'configs/{c}' for c in PAPER]
    for model in models:
        assert model['Name'] == Path(model['Config']).stem
        for result in model.get('Results', ()):
            assert result['Source'] == 'published by the paper'
    results = {m['Name']: [list(r['Metrics'].values()) for r in m.get('Results', ())] for m in models}
    assert results['mask_rcnn_mila_t_1x'] == [[46.8], [42.1]] and results['mask_rcnn_mila_s_3x'] == [[50.5], [44.9]]
    assert results['mask_rcnn_mila_b_3x'] == [] and results['upernet_mila_b_160k'] == [[51.9, 52.5]]
