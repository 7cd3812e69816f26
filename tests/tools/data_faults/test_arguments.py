"""Types and arguments that nothing knows are told before torch is imported, in the words of the build."""

import pytest
from mmengine import registry as registries

from mila_mm.engine.config.build_errors import building
from mila_mm.engine.config.load import load_config
from mila_mm.engine.data import arguments
from mila_mm.engine.data.arguments import check_arguments
from mila_mm.engine.data.first_look import first_look
from mila_mm.errors import UserError

STEPS = "train_dataloader['dataset']['pipeline']"
# Lines of a config, where the fault is, in which registry, and the part as mmengine is given it.
PARTS = {
    'a transform': (
        f"{STEPS}[2]['keep_ratoi'] = True",
        ('train_dataloader.dataset.pipeline.2', 'TRANSFORMS'),
        dict(type='Resize', scale=(64, 64), keep_ratoi=True),
    ),
    'one inside of another': (
        f"{STEPS}.append(dict(type='RandomApply', transforms=[dict(type='RandomFlip', probb=1)]))",
        ('train_dataloader.dataset.pipeline.4.transforms.0', 'TRANSFORMS'),
        dict(type='RandomFlip', probb=1),
    ),
    'a data set': (
        "train_dataloader['dataset']['test_mod'] = True",
        ('train_dataloader.dataset', 'DATASETS'),
        dict(type='CocoDataset', test_mod=True),
    ),
    'a metric': (
        "val_evaluator['clas_wise'] = True",
        ('val_evaluator', 'METRICS'),
        dict(type='CocoMetric', clas_wise=True),
    ),
    'a hook': (
        "custom_hooks = [dict(type='EarlyStoppingHook', monitor='coco/bbox_mAP', patiense=2, priority=49)]",
        ('custom_hooks.0', 'HOOKS'),
        dict(type='EarlyStoppingHook', monitor='coco/bbox_mAP', patiense=2),
    ),
    'a head': (
        'model["roi_head"]["bbox_head"]["num_clases"] = 6',
        ('model.roi_head.bbox_head', 'MODELS'),
        dict(type='Shared2FCBBoxHead', num_clases=6),
    ),
    'a neck': (
        "model['neck']['num_out'] = 5",
        ('model.neck', 'MODELS'),
        dict(type='FPN', in_channels=[8], out_channels=8, num_out=5),
    ),
    'our backbone': (
        "model['backbone']['drop_path'] = 0.1",
        ('model.backbone', 'MODELS'),
        dict(type='mila_mm.MILA', drop_path=0.1),
    ),
    'a transform that there is not': (
        f"{STEPS}[2] = dict(type='Rezise', scale=(64, 64))",
        ('train_dataloader.dataset.pipeline.2', 'TRANSFORMS'),
        dict(type='Rezise', scale=(64, 64)),
    ),
    'a metric that there is not': (
        "val_evaluator['type'] = 'CoccoMetric'",
        ('val_evaluator', 'METRICS'),
        dict(type='CoccoMetric'),
    ),
}


@pytest.mark.parametrize('fault', PARTS)
def test_the_words_are_those_of_the_build(detector_of, shapes, fault) -> None:
    more, (key, registry), part = PARTS[fault]
    with pytest.raises(UserError) as first:
        first_look(str(detector_of(shapes, more)), (), ('train', 'val'))
    with (
        getattr(registries, registry).switch_scope_and_registry('mmdet') as known,
        pytest.raises(UserError) as late,
        building(key),
    ):
        known.build(part)
    assert str(first.value).splitlines()[0] == str(late.value)


OTHERS = {
    'a schedule': ("param_scheduler = [dict(type='StepLR', step_siz=2)]", 'param_scheduler.0: StepLR does not take'),
    'an optimizer wrapper': ('optim_wrapper = dict(clip_gard=dict(max_norm=1))', "did you mean 'clip_grad'?"),
    'a loop': (
        "train_cfg = dict(max_epoch=1, _delete_=True, type='EpochBasedTrainLoop')",
        "train_cfg: EpochBasedTrainLoop does not take 'max_epoch'",
    ),
    'a dataloader': (
        "train_dataloader['batchsize'] = 2",
        "train_dataloader: DataLoader does not take 'batchsize'",
    ),
    'a default hook': ('default_hooks = dict(logger=dict(intervall=5))', 'default_hooks.logger: LoggerHook does not'),
    'a backend': (
        "visualizer = dict(vis_backends=[dict(type='LocalVisBackend', folder='x')])",
        "visualizer.vis_backends.0: LocalVisBackend does not take 'folder'",
    ),
}


@pytest.mark.parametrize('fault', OTHERS)
def test_other_parts(detector_of, shapes, fault) -> None:
    more, said = OTHERS[fault]
    with pytest.raises(UserError) as refused:
        first_look(str(detector_of(shapes, more)), (), ('train', 'val'))
    assert said in str(refused.value)


WRONG = f"{STEPS}[2]['keep_ratoi'] = True\n"
LEFT_ALONE = {
    'custom imports': f"{WRONG}custom_imports = dict(imports=['own_parts'])",
    'a runner of ones own': f"{WRONG}runner_type = 'OwnRunner'",
    'another scope': f"{STEPS}[2]['_scope_'] = 'own'\n{STEPS}[2]['keep_ratoi'] = True",
    'keyword arguments that go elsewhere': "default_hooks = dict(checkpoint=dict(anything=1))",
    'transforms of another library': (
        f"{STEPS}.append(dict(type='Albu', transforms=[dict(type='RandomFlip', anything=1)]))"
    ),
    'what a part of another scope holds': (
        "model = dict(type='EncoderDecoder', _scope_='mmseg', backbone=dict(type='ResNet', contract_dilation=True), "
        "decode_head=dict(type='FCNHead', anything=1))"
    ),
    'our backbone and metric without a scope': (
        "model['backbone']['type'] = 'MILA'\n"
        "val_evaluator = [val_evaluator, dict(type='DumpSegResults', out_file_path='out.pkl')]\n"
        "custom_imports = dict(imports=['mila_mm.models'])"
    ),
    'imports that are no dict': f"{WRONG}custom_imports = ['os']",
}  # fmt: skip


@pytest.mark.parametrize('more', LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_what_is_not_certain_is_left_alone(detector_of, shapes, more) -> None:
    cfg = load_config(str(detector_of(shapes, more)), import_custom_modules=False)
    assert check_arguments(cfg, ['train', 'val'], 'mmdet') == []


def test_an_argument_that_a_class_lets_pass_is_a_warning(segmentor) -> None:
    cfg = load_config(str(segmentor))
    assert check_arguments(cfg, ['train', 'val'], 'mmseg') == []
    cfg.val_evaluator['iou_metric'] = ['mIoU']
    (finding,) = check_arguments(cfg, ['train', 'val'], 'mmseg')
    assert finding.level == 'warning' and finding.where == 'val_evaluator.iou_metric'
    assert "IoUMetric lets any argument pass; did you mean 'iou_metrics'?" in finding.message


def test_a_data_set_of_older_versions_is_named_with_its_successor(segmentor) -> None:
    cfg = load_config(str(segmentor))
    cfg.train_dataloader['dataset']['type'] = 'CustomDataset'
    (finding,) = check_arguments(cfg, ['train'], 'mmseg')
    assert 'is of mmdet 2 or mmseg 0' in finding.message and 'BaseSegDataset' in finding.message


def test_imports_of_the_libraries_change_nothing(detector_of, shapes) -> None:
    more = f"{WRONG}custom_imports = dict(imports=['mmpretrain.models', 'mmdet.models'], allow_failed_imports=False)"
    cfg = load_config(str(detector_of(shapes, more)), import_custom_modules=False)
    assert len(check_arguments(cfg, ['train'], 'mmdet')) == 1


def test_types_that_are_registered_elsewhere_in_a_library_are_known(detector_of, shapes) -> None:
    """mmdet has a preprocessor of models among its transforms."""
    cfg = load_config(str(detector_of(shapes, "model['data_preprocessor'] = dict(type='LineDetDataProcessor')")))
    assert check_arguments(cfg, ['train'], 'mmdet') == []


@pytest.mark.parametrize('package', ['mmdet', 'mmcv'])
def test_nothing_is_unknown_to_a_library_without_its_source(detector_of, shapes, monkeypatch, package) -> None:
    cfg = load_config(str(detector_of(shapes)))
    cfg.train_dataloader['dataset']['pipeline'][2] = dict(type='Rezise', scale=(64, 64))
    assert len(check_arguments(cfg, ['train'], 'mmdet')) == 1
    monkeypatch.setattr(arguments, 'readable', lambda name: name != package)
    assert check_arguments(cfg, ['train'], 'mmdet') == []


def test_a_class_of_ones_own_under_a_known_name_is_left_alone(detector_of, shapes, monkeypatch) -> None:
    from mmdet.registry import TRANSFORMS

    class Resize:
        def __init__(self, keep_ratoi: bool) -> None: ...

    cfg = load_config(str(detector_of(shapes, WRONG)))
    assert len(check_arguments(cfg, ['train'], 'mmdet')) == 1
    monkeypatch.setitem(TRANSFORMS._module_dict, 'Resize', Resize)
    assert check_arguments(cfg, ['train'], 'mmdet') == []


def test_stages_that_do_not_run_are_left_alone(detector_of, shapes) -> None:
    cfg = load_config(str(detector_of(shapes, f"{WRONG}param_scheduler = [dict(type='StepLR', step_siz=2)]")))
    assert len(check_arguments(cfg, ['train', 'val'], 'mmdet')) == 3  # both data sets share the step
    assert len(check_arguments(cfg, ['val'], 'mmdet')) == 1
