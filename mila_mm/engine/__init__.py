"""Training and testing: mmengine's runner with what it lacks, for detectors and segmentors alike."""

from mila_mm.engine.config.extras import EarlyStopHook, Extras
from mila_mm.engine.config.load import load_config, scope_of
from mila_mm.engine.hooks.checkpoint import CheckpointHook
from mila_mm.engine.hooks.divergence import DivergenceHook
from mila_mm.engine.hooks.draw_predictions import PredictionDrawHook
from mila_mm.engine.hooks.identity import RunIdentityHook
from mila_mm.engine.hooks.mesa import MESAHook
from mila_mm.engine.hooks.nonfinite import NonFiniteHook
from mila_mm.engine.hooks.resume_state import ResumeStateHook
from mila_mm.engine.hooks.stop import StopHook
from mila_mm.engine.inference.predict import predict
from mila_mm.engine.inference.predictor import Predictor
from mila_mm.engine.optimizers.amp import AmpOptimWrapper
from mila_mm.engine.optimizers.layer_decay import LayerDecayOptimWrapperConstructor
from mila_mm.engine.runner.loops import EpochBasedTrainLoop, IterBasedTrainLoop
from mila_mm.engine.runner.runner import Runner, build_runner
from mila_mm.engine.runner.sampler import ResumableBatchSampler
from mila_mm.engine.runner.sharded_model import FullyShardedModel
from mila_mm.engine.testing import DumpSegResults, test
from mila_mm.engine.training import train

__all__ = [
    'AmpOptimWrapper',
    'CheckpointHook',
    'DivergenceHook',
    'DumpSegResults',
    'EarlyStopHook',
    'EpochBasedTrainLoop',
    'Extras',
    'FullyShardedModel',
    'IterBasedTrainLoop',
    'LayerDecayOptimWrapperConstructor',
    'MESAHook',
    'NonFiniteHook',
    'PredictionDrawHook',
    'Predictor',
    'ResumableBatchSampler',
    'ResumeStateHook',
    'RunIdentityHook',
    'Runner',
    'StopHook',
    'build_runner',
    'load_config',
    'predict',
    'scope_of',
    'test',
    'train',
]
