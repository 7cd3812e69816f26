"""Try a model: build it with zeros for weights, compute its training loss on generated data, see what it reads."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from mmengine.model import revert_sync_batchnorm
from torch import Tensor, nn

from mila_mm.engine.nested import tensors_in
from mila_mm.swap import clean
from mila_mm.swap.job import Job, plain
from mila_mm.swap.light import WITHOUT_BEARING, build, graph_behind, in_scope, reason_of, sorted_config
from mila_mm.swap.probe import mila_maps
from mila_mm.swap.result import Draft, Maps, SwapFailed, SwapRefused
from mila_mm.swap.rewire import GUESSED, Feed
from mila_mm.swap.route import Route, rewire_all
from mila_mm.swap.samples import make_batch

# Small and odd first; then what a neck needs whose maps must halve exactly; then what a fixed pyramid needs.
EVEN = (128, 160)
SIZES = ((127, 161), EVEN, (320, 320))


class _TrialFailed(Exception):
    """A model could not be built or run; the message is the reason."""


@dataclass(frozen=True)
class Trial:
    """What a model's run has shown.

    Attributes:
        used: Indices of the backbone's maps that the losses depend on.
        parameters: Names of all parameters.
        size: Height and width of the images.
    """

    used: tuple[int, ...]
    parameters: tuple[str, ...]
    size: tuple[int, int]


def _try_model(model: dict[str, Any], scope: str) -> Trial:
    """Build a model and compute its losses on generated data.

    Args:
        scope: 'mmdet' or 'mmseg'.

    Raises:
        _TrialFailed: If the model cannot be built or run, with the reason.
    """
    key = repr(sorted_config(model, WITHOUT_BEARING))
    return _try_once(_Hashed(key, model, scope))


@dataclass(frozen=True)
class _Hashed:
    key: str
    model: dict[str, Any]
    scope: str

    def __hash__(self) -> int:
        return hash((self.key, self.scope))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hashed) and (self.key, self.scope) == (other.key, other.scope)


def _try_once(subject: _Hashed) -> Trial:
    outcome = _outcome(subject)
    if isinstance(outcome, str):
        raise _TrialFailed(outcome)
    return outcome


@lru_cache(maxsize=512)
def _outcome(subject: _Hashed) -> Trial | str:
    try:
        module = revert_sync_batchnorm(build(for_trial(subject.model, subject.scope), subject.scope))
        module.train()
    except Exception as error:  # noqa: BLE001 - any error of a constructor is the finding
        return reason_of(error)
    for size in SIZES:
        try:
            return _run(module, subject, size)
        except Exception as error:  # noqa: BLE001 - any error of a forward is the finding
            reason = reason_of(error)
    return reason


def for_trial(model: dict[str, Any], scope: str) -> dict[str, Any]:
    """Return a copy of a model's config that takes images of any size as they are."""
    model = copy.deepcopy(model)
    preprocessor = model.get('data_preprocessor')
    if not isinstance(preprocessor, dict):
        model['data_preprocessor'] = dict(type='DetDataPreprocessor' if scope == 'mmdet' else 'SegDataPreProcessor')
    else:
        preprocessor.pop('batch_augments', None)
        if scope == 'mmseg':
            for key in ('size', 'size_divisor', 'test_cfg'):
                preprocessor.pop(key, None)
    return model


def _run(module: nn.Module, subject: _Hashed, size: tuple[int, int]) -> Trial:
    outputs: list[Any] = []
    hook = module.backbone.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    try:
        with in_scope(subject.scope), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            batch = make_batch(subject.model, subject.scope, size)
            preprocessor = module.data_preprocessor
            if subject.scope == 'mmseg':
                preprocessor.size = size
            data = preprocessor(batch, True)
            losses = module(**data, mode='loss')
    finally:
        hook.remove()
    maps = outputs[-1] if outputs else ()
    maps = [maps] if isinstance(maps, Tensor) else maps
    nodes = graph_behind([sum_of_losses(losses)])
    used = tuple(i for i, m in enumerate(maps) if isinstance(m, Tensor) and m.grad_fn in nodes)
    return Trial(used, tuple(name for name, _ in module.named_parameters()), size)


def sum_of_losses(losses: Any) -> Tensor:
    """Add up all tensors of a dict of losses that have a gradient.

    Args:
        losses: Tensors, dicts and lists of them.

    Returns:
        A scalar.

    Raises:
        ValueError: If none has a gradient.
    """
    leaves = [leaf.sum() for leaf in tensors_in(losses) if leaf.requires_grad]
    if not leaves:
        raise ValueError('no loss depends on the weights')
    return torch.stack(leaves).sum()


_BEFORE_HEADS = 'backbone and neck were built and run; what they hand to the heads is as before'

# torch's words for a map of another width than the layer that reads it
_MISFIT = 'Given groups='


def rewired(job: Job) -> tuple[Draft, Maps, str, Trial | None]:
    """Rewire a config and check the result; then once more without the maps that nothing reads.

    Returns:
        The config, MILA's maps, what was checked, and the trial of the new model, None where it could not run.

    Raises:
        SwapFailed: If the model cannot be made to run.
        SwapRefused: If it is clear why not.
    """
    everything = tuple(range(len(job.stages)))
    try:
        draft, maps, checked, trial = _checked(job, everything)
    except (SwapFailed, SwapRefused) as error:
        if job.source.failed_imports:
            missing = ', '.join(f'{module} ({reason})' for module, reason in job.source.failed_imports.items())
            raise SwapRefused(
                f'{error}\nThe config needs by custom_imports what cannot be imported here: {missing}; '
                'mend it or put it on PYTHONPATH'
            ) from error
        raise
    if trial is None or trial.used in (everything, ()):
        return draft, maps, checked, trial
    try:
        lean = _checked(job, trial.used)
        if lean[3] is not None and lean[3].used == tuple(range(len(trial.used))):
            return lean
    except (SwapFailed, SwapRefused):
        pass  # the consumers insist on all maps
    draft.put(('find_unused_parameters',), True, 'the norms of maps that nothing reads get no gradient')
    return draft, maps, checked, trial


def _checked(job: Job, kept: tuple[int, ...]) -> tuple[Draft, Maps, str, Trial | None]:
    """Rewire for some of the maps and try the model; a second time with all that equals an old width rewritten."""
    failure: SwapFailed | None = None
    for eager in (False, True):
        draft = Draft(plain(job.original))
        backbone = job.backbone | dict(out_indices=tuple(job.stages[i] for i in kept))
        maps = mila_maps(backbone, job.source.scope)
        draft.put(
            (*job.source.holder, 'backbone'), _without_defaults(backbone), f'gives {maps}; the old one {job.probe.maps}'
        )
        try:
            route = rewire_all(draft, job, Feed(job.probe.maps, maps, kept), eager)
            checked, trial = _try(draft, job, route)
        except SwapFailed as error:
            failure = failure or error
            continue
        guessed = [change.key for change in draft.merged() if GUESSED in change.why]
        if guessed:
            draft.unknowns.append(
                f'{", ".join(guessed)}: rewritten because equal to an old width, not because of the '
                'name; look whether that is what it means'
            )
        return draft, maps, checked, trial
    assert failure is not None
    raise failure


def _try(draft: Draft, job: Job, route: Route) -> tuple[str, Trial | None]:
    """Build and run the new model; where it fails, see whether the original would have done better."""
    scope, holder = job.source.scope, job.source.holder
    if not job.whole_models and not route.heads_see_a_change and route.used is not None:
        return _BEFORE_HEADS, Trial(route.used, (), (0, 0))
    try:
        trial = _try_model(draft.get(holder), scope)
    except _TrialFailed as failure:
        _refuse_known(job.model, failure)
        try:
            _try_model(job.model, scope)
        except _TrialFailed as original:
            if route.heads_see_a_change:
                if str(original) == str(failure) or _MISFIT in str(original):
                    raise SwapRefused(
                        f'the config does not work with its own backbone either: {original}'
                    ) from original
                raise SwapFailed(
                    f'the new model cannot be built and run here, so its heads cannot be checked: {failure}'
                ) from original
            draft.unknowns.append(f'the heads could not be run here, with the old backbone neither: {original}')
            return _BEFORE_HEADS, Trial(route.used, (), (0, 0)) if route.used is not None else None
        raise SwapFailed(f'the heads do not take the new maps: {failure}') from failure
    if trial.size != SIZES[0] and trial.size == EVEN and scope == 'mmdet' and clean.pad_to(draft, holder, 32):
        trial = _try_model(draft.get(holder), scope)
    return f'the model was built and its training loss computed on images of {trial.size[0]} x {trial.size[1]}', trial


def _refuse_known(model: dict[str, Any], failure: _TrialFailed) -> None:
    """Give the reasons that are known for heads that fail with other maps."""
    shared = (model.get('roi_head') or {}).get('shared_head')
    if isinstance(shared, dict):
        raise SwapRefused(
            f'the backbone is fused with its head: roi_head.shared_head ({shared.get("type")}) is the '
            'last stage of the old backbone, with widths of its own'
        )
    if 'Output size is too small' in str(failure):
        raise SwapRefused(
            f'a head works on a fixed input grid: it pools over a window larger than the deepest map ({failure})'
        )


def _without_defaults(backbone: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in backbone.items() if (k, v) != ('out_indices', (0, 1, 2, 3))}
