"""The scan with a forget gate against the recurrence token by token, forward + backward on a CPU.

    python -m benchmarks.gated_scan                         # N = 3136, C = 96, 3 heads of d = 32, batch 8, 2 threads

Two recurrences: the reference of the package, which indexes a token of its inputs at each step, and the same with the
inputs unbound into tokens first, which spares autograd the gradients of the indexing. Results are compared before any
timing. Rounds alternate, so that a noisy machine disturbs all; ratios are medians of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.backbone_cpu import machine
from mila_mm.ops import gated_linear_attention, gated_linear_attention_reference

ROOT = Path(__file__).resolve().parent.parent

Operator = Callable[..., Tensor]


def unbound(
    q: Tensor, k: Tensor, v: Tensor, *, num_heads: int, forget_gate: tuple[Tensor, Tensor], normalize: bool
) -> Tensor:
    """The recurrence on lists of tokens; the fastest plain loop that we know."""
    q, k, v, delta = (t.unflatten(-1, (num_heads, -1)).unbind(1) for t in (q, k, v, forget_gate[0]))
    rate = forget_gate[1].unflatten(-1, (num_heads, -1)).transpose(0, 1)
    state = v[0].new_zeros(*v[0].shape[:2], q[0].shape[-1], v[0].shape[-1])
    ys = []
    for q_i, k_i, v_i, delta_i in zip(q, k, v, delta, strict=True):
        state = torch.exp(rate * delta_i[:, :, None]) * state + k_i[..., None] * v_i[:, :, None]
        ys.append((q_i[:, :, None] @ state).squeeze(-2))
    return torch.stack(ys, dim=1).flatten(2)


def step(operator: Operator, leaves: list[Tensor], grad: Tensor, heads: int) -> list[Tensor]:
    """One forward and backward: the output and the gradients."""
    q, k, v, delta, rate = leaves
    y = operator(q, k, v, num_heads=heads, forget_gate=(delta, rate), normalize=False)
    return [y, *torch.autograd.grad(y, leaves, grad)]


def main() -> int:
    """Compare, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--tokens', type=int, default=3136)
    parser.add_argument('--channels', type=int, default=96)
    parser.add_argument('--heads', type=int, default=3)
    parser.add_argument('--states', type=int, default=32, help='d, channels of q in one head [32]')
    parser.add_argument('--batch', type=int, default=8)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--out', type=Path, default=ROOT / 'benchmarks' / 'results' / 'gated_scan.json')
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    widths = [args.heads * args.states] * 2 + [args.channels] * 2
    leaves = [torch.rand(args.batch, args.tokens, w) for w in widths] + [-torch.rand(args.states, args.channels)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    grad = torch.randn(args.batch, args.tokens, args.channels)
    operators = {'scan': gated_linear_attention, 'unbound': unbound, 'reference': gated_linear_attention_reference}

    results = {name: step(operator, leaves, grad, args.heads) for name, operator in operators.items()}
    for name in ('unbound', 'reference'):
        for mine, theirs in zip(results['scan'], results[name], strict=True):
            error = ((mine - theirs).abs().max() / theirs.abs().max()).item()
            if error > 1e-4:
                raise SystemExit(f'scan and {name} differ by {error:.1e} of the largest magnitude')
    del results

    rounds = []
    for _ in range(args.rounds):
        times = {}
        for name, operator in operators.items():
            start = time.perf_counter()
            step(operator, leaves, grad, args.heads)
            times[name] = time.perf_counter() - start
        rounds.append(times)
    document = {
        'machine': machine(),
        **{k: v for k, v in vars(args).items() if k != 'out'},
        **{f'{name}_s': statistics.median(r[name] for r in rounds) for name in operators},
        **{
            f'{name}_over_scan': statistics.median(r[name] / r['scan'] for r in rounds)
            for name in ('unbound', 'reference')
        },
    }
    for name in operators:
        ratio = document.get(f'{name}_over_scan', 1.0)
        print(f'{name:10s} forward + backward {document[f"{name}_s"]:7.3f} s   {ratio:5.1f} x the time of the scan')
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(document, indent=2) + '\n')
    print(f'written to {args.out}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
