"""Training and testing: mmengine's runner with what it lacks, for detectors and segmentors alike.

The names are imported when they are first asked for (PEP 562): a look at a config and its files needs no torch, whose
import takes longer than most mistakes should have to wait for their message.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    'AmpOptimWrapper': 'optimizers.amp',
    'CheckpointHook': 'hooks.checkpoint',
    'DivergenceHook': 'hooks.divergence',
    'DumpSegResults': 'testing',
    'EarlyStopHook': 'config.extras',
    'EpochBasedTrainLoop': 'runner.loops',
    'Extras': 'config.extras',
    'FullyShardedModel': 'runner.sharded_model',
    'IterBasedTrainLoop': 'runner.loops',
    'LayerDecayOptimWrapperConstructor': 'optimizers.layer_decay',
    'MESAHook': 'hooks.mesa',
    'NonFiniteHook': 'hooks.nonfinite',
    'PredictionDrawHook': 'hooks.draw_predictions',
    'Predictor': 'inference.predictor',
    'ResumableBatchSampler': 'runner.sampler',
    'ResumeStateHook': 'hooks.resume_state',
    'RunIdentityHook': 'hooks.identity',
    'Runner': 'runner.runner',
    'StopHook': 'hooks.stop',
    'build_runner': 'runner.runner',
    'load_config': 'config.load',
    'predict': 'inference.predict',
    'scope_of': 'config.load',
    'test': 'testing',
    'train': 'training',
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(f'{__name__}.{_HOMES[name]}'), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
