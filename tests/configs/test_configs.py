"""Every shipped config: one training step, prediction and evaluation of a shrunken copy."""

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


# Those of MILA-S differ from those of MILA-T and MILA-B in widths, which are narrowed here anyway, and in
# rates that test_recipes.py compares.
LIKE_OTHERS = [name for name in CONFIGS if '_mila_s_' in name]


@pytest.mark.parametrize(
    'name', [pytest.param(name, marks=pytest.mark.slow if name in LIKE_OTHERS else ()) for name in CONFIGS]
)
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
