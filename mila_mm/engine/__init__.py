"""Training and testing: mmengine's runner with what it lacks, for detectors and segmentors alike."""

from mila_mm.engine.config import load_config, scope_of
from mila_mm.engine.draw import PredictionDrawHook
from mila_mm.engine.dump import DumpSegResults
from mila_mm.engine.layer_decay import LayerDecayOptimWrapperConstructor
from mila_mm.engine.resume import ResumeStateHook
from mila_mm.engine.runner import Runner, build_runner
from mila_mm.engine.testing import test
from mila_mm.engine.training import train

__all__ = [
    'DumpSegResults',
    'LayerDecayOptimWrapperConstructor',
    'PredictionDrawHook',
    'ResumeStateHook',
    'Runner',
    'build_runner',
    'load_config',
    'scope_of',
    'test',
    'train',
]
