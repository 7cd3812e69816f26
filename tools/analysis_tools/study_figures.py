#!/usr/bin/env python
"""Draw the study's figures from checkpoints and images: ``study_figures.py {decay,input-gate,forget-gate,...}``."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mila_mm  # noqa: F401  installs the stand-in for mmcv._ext before anything imports mmcv
from mila_mm import cli

MODEL_HELP = (
    '[LABEL=]SOURCE[@WEIGHTS]: SOURCE a config (path, mmdet::..., mmseg::...) or timm:NAME, WEIGHTS a checkpoint, '
    'a mila:// name or, with timm, `pretrained`; random weights without'
)


def parse_args(argv: Sequence[str] | None) -> cli.argparse.Namespace:
    """Parse the command line."""
    parser = cli.ArgumentParser(description="Draw the study's figures as PNG, from any checkpoint and images.")
    figures = parser.add_subparsers(dest='figure', required=True, metavar='FIGURE')
    decay = figures.add_parser('decay', help='what constant forget gates mean as decaying windows; needs no model')
    decay.add_argument('--gates', type=float, nargs='+', default=[0.2, 0.6, 0.8], help='values of A [0.2 0.6 0.8]')
    about = {
        'input-gate': 'maps of the input gate over images',
        'forget-gate': 'mean forget gate of each block',
        'token-lengths': 'standard deviation of the lengths of tokens behind each block, of one or more models',
        'erf': 'effective receptive field of one or more backbones of any kind',
    }
    for name, text in about.items():
        part = figures.add_parser(name, help=text)
        part.add_argument('models', nargs='+', metavar='MODEL', help=MODEL_HELP)
        part.add_argument('--images', nargs='+', required=True, metavar='PATH', help='images, or folders of them')
        part.add_argument('--limit', type=int, metavar='N', help='take at most N images [4 for maps, else 50]')
        part.add_argument('--size', type=int, nargs='+', default=[224], metavar='SIDE', help='height and width [224]')
        if name == 'input-gate':
            part.add_argument('--layers', nargs='+', metavar='STAGE.BLOCK', help='blocks to show, from 1 [at most six]')
        if name == 'erf':
            part.add_argument('--stage', type=int, default=-1, help='whose map, from 0 [the last]')
            part.add_argument('--scale', choices=['log', 'gamma'], default='log', help='of the colours [log]')
    for part in figures.choices.values():
        part.add_argument('--out', required=True, metavar='PNG', help='picture to write')
    args = parser.parse_args(argv)
    if args.figure != 'decay' and (len(args.size) > 2 or min(args.size) < 1):
        parser.error(f'--size: expected one or two numbers of pixels, got {" ".join(map(str, args.size))}')
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Draw one figure."""
    args = parse_args(argv)
    from mila_mm.engine.config.checks import check_work_dir
    from mila_mm.errors import UserError
    from mila_mm.study.figures import draw as study_figures

    out = Path(args.out)
    check_work_dir(out.absolute().parent, '--out')
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    try:
        if args.figure == 'decay':
            study_figures.save_decay_windows(out, args.gates)
        else:
            {'input-gate': draw_input_gates, 'erf': draw_receptive_fields}.get(args.figure, draw_curves)(args, out)
    except ValueError as error:
        raise UserError(str(error)) from error
    print(out)


def open_models(args: cli.argparse.Namespace, default_limit: int) -> tuple[list[Any], Any]:
    """Build the models and read the images.

    Args:
        default_limit: Images taken without ``--limit``.

    Returns:
        The models, and the images (N, H, W, 3).
    """
    from mila_mm.study.figures.feature_model import open_feature_model, read_images

    size = (args.size[0], args.size[-1])
    images = read_images(args.images, size, default_limit if args.limit is None else max(1, args.limit))
    return [open_feature_model(spec) for spec in args.models], images


def batches(model: Any, images: Any) -> list[Any]:
    """Return the images one by one as the model takes them."""
    return [model.normalise(images[i : i + 1]) for i in range(len(images))]


def draw_input_gates(args: cli.argparse.Namespace, out: Path) -> None:
    """Draw the maps of the input gate of one model."""
    from mila_mm.errors import UserError
    from mila_mm.study.figures.draw import save_gate_maps
    from mila_mm.study.figures.probes import input_gates

    models, images = open_models(args, 4)
    if len(models) > 1:
        raise UserError(f'input-gate: expected one model, got {len(models)}')
    gates = input_gates(models[0].backbone, models[0].features, models[0].normalise(images))
    known = {f'{gate.stage + 1}.{gate.block + 1}': gate for gate in gates}
    unknown = [name for name in args.layers or () if name not in known]
    if unknown:
        raise UserError(f'--layers: there is no block {unknown[0]}; blocks with an input gate are {", ".join(known)}')
    names = args.layers or [list(known)[round(i * (len(known) - 1) / 5)] for i in range(6)]
    save_gate_maps(images, [known[name] for name in dict.fromkeys(names)], out)


def draw_curves(args: cli.argparse.Namespace, out: Path) -> None:
    """Draw a number per block, for each model."""
    from mila_mm.study.figures.draw import save_layer_curves
    from mila_mm.study.figures.probes import forget_gates, token_length_std

    models, images = open_models(args, 50)
    probe = forget_gates if args.figure == 'forget-gate' else token_length_std
    curves = {model.label: probe(model.backbone, model.features, batches(model, images)) for model in models}
    if args.figure == 'forget-gate':
        save_layer_curves(curves, out, 'mean forget gate', limits=(0, 1))
    else:
        save_layer_curves(curves, out, 'std of token lengths', log=True)
    for label, values in curves.items():
        print(label, ' '.join(f'{v.value:.3g}' for v in values))


def draw_receptive_fields(args: cli.argparse.Namespace, out: Path) -> None:
    """Draw the effective receptive field of each model."""
    from mila_mm.study.figures.draw import save_receptive_fields
    from mila_mm.study.figures.probes import area_ratios, effective_receptive_field

    models, images = open_models(args, 50)
    fields = {m.label: effective_receptive_field(m.features, batches(m, images), args.stage) for m in models}
    save_receptive_fields(fields, out, scale=args.scale)
    for label, field in fields.items():
        print(label, ' '.join(f'{ratio:.4f}' for ratio in area_ratios(field)))


if __name__ == '__main__':
    sys.exit(cli.execute(main))
