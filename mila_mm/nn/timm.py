"""MILA's classifiers as models of timm: ``timm.create_model('mila_tiny')``, also ``mila_small`` and ``mila_base``.

They are registered where both ``mila_mm`` and ``timm`` have been imported, in any order; importing this module
registers them as well. ``pretrained=True`` fetches the published weights, see docs/weights.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    register_notrace_function,
    register_notrace_module,
)

if TYPE_CHECKING:
    from torch import Tensor

    from mila_mm.nn.classifier import MILAClassifier

__all__ = ['mila_base', 'mila_small', 'mila_tiny']


def _cfg(arch: str) -> dict[str, Any]:
    """Describe published weights; timm hands the name in ``file`` to ``MILAClassifier.load_pretrained``."""
    return dict(
        file=f'mila://{arch}-in1k',
        custom_load=True,
        input_size=(3, 224, 224),
        pool_size=(7, 7),
        crop_pct=0.875,
        interpolation='bicubic',
        num_classes=1000,
        first_conv='patch_embed.conv1.conv',
        classifier='head',
        license='mit',
        origin_url='https://github.com/LeapLabTHU/MLLA',
        paper_ids='arXiv:2405.16605',
        paper_name='Demystify Mamba in Vision: A Linear Attention Perspective',
    )


default_cfgs = generate_default_cfgs({f'mila_{arch}.in1k': _cfg(arch) for arch in ('tiny', 'small', 'base')})


def _checkpoint_filter(state_dict: dict[str, Any], model: Any) -> dict[str, Tensor]:
    """Take released names and wrappings off a file that was named instead of the published one."""
    from mila_mm.weights.names import to_project, unwrap

    return to_project(unwrap(state_dict)[0])[0]


def _create(variant: str, pretrained: bool, **kwargs: Any) -> MILAClassifier:
    # Deferred: this module is imported as soon as timm is, and most programs with timm in them build no MILA.
    from mila_mm.nn import layers
    from mila_mm.nn.classifier import MILAClassifier

    # What asks for sizes, dtypes or the mode is one node of a torch.fx graph and decides when the graph runs.
    register_notrace_module(layers.DepthwiseConv)
    for leaf in ('_may_overwrite', 'add_branch', 'cpe_norm', 'dwc_silu', 'mila_attention', 'pad_to_multiple'):
        register_notrace_function(getattr(layers, leaf))
    return build_model_with_cfg(
        MILAClassifier,
        variant,
        pretrained,
        pretrained_filter_fn=_checkpoint_filter,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls='getter'),
        arch=variant.removeprefix('mila_'),
        **kwargs,
    )


@register_model
def mila_tiny(pretrained: bool = False, **kwargs: Any) -> MILAClassifier:
    """MILA tiny: 24.4 M parameters, 4.2 G multiply-adds at 224, ImageNet-1K top-1 83.5 (published).

    Args:
        pretrained: Whether to load the published weights.
        **kwargs: For :class:`mila_mm.MILAClassifier`, and timm's ``features_only``, ``out_indices``.

    Returns:
        The model.
    """
    return _create('mila_tiny', pretrained, **kwargs)


@register_model
def mila_small(pretrained: bool = False, **kwargs: Any) -> MILAClassifier:
    """MILA small: 43.0 M parameters, 7.3 G multiply-adds at 224, ImageNet-1K top-1 84.4 (published).

    Args:
        pretrained: Whether to load the published weights.
        **kwargs: For :class:`mila_mm.MILAClassifier`, and timm's ``features_only``, ``out_indices``.

    Returns:
        The model.
    """
    return _create('mila_small', pretrained, **kwargs)


@register_model
def mila_base(pretrained: bool = False, **kwargs: Any) -> MILAClassifier:
    """MILA base: 96.0 M parameters, 16.2 G multiply-adds at 224, ImageNet-1K top-1 85.3 (published).

    Args:
        pretrained: Whether to load the published weights.
        **kwargs: For :class:`mila_mm.MILAClassifier`, and timm's ``features_only``, ``out_indices``.

    Returns:
        The model.
    """
    return _create('mila_base', pretrained, **kwargs)
