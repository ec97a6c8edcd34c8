"""The head of the learner, chunked against naive: time and memory of forward and backward. Prints JSON.

    python benchmarks/head.py [--rows 2048] [--pairs 7] [--write]

Both make log-probabilities and entropies of the same rows (V = 49,152, D = 576, bfloat16, as SmolLM2-135M has them) and
the gradients of hidden states and embedding through both. Time: the two take turns in one process, and the figure is
the median of the pairs' ratios. Memory: of a fresh process each, the peak (VmHWM) less what it held before the first
forward pass; the two gradients themselves, which both must return, are told apart as `gradients_mib`. Quality: the
largest difference of each to float64 on the first rows.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from typing import Any

from measuring import Turns, child, finish, machine, peak_mib, resident_mib

VOCABULARY, HIDDEN = 49152, 576
CHECKED_ROWS = 64
KINDS = ("chunked", "naive")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--write", action="store_true", help="also write benchmarks/results/head-DATE.json")
    parser.add_argument("--child", choices=("time", *KINDS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure_child(options.child, options.rows, options.pairs)))
        return
    in_child = partial(child, __file__, "--rows", str(options.rows), "--pairs", str(options.pairs))
    memory = {kind: in_child("--child", kind) for kind in KINDS}
    timed = in_child("--child", "time")
    activations = {kind: found["peak_mib"] - found["gradients_mib"] for kind, found in memory.items()}
    figures = {
        **machine(),
        "rows": options.rows,
        "memory": {
            **memory,
            "naive_over_chunked": round(activations["naive"] / activations["chunked"], 2),
            "target_naive_over_chunked": 5.0,
        },
        "time": timed | {"target_chunked_over_naive": 1.1},
    }
    finish("head", figures, options.write)


def measure_child(kind: str, rows: int, pairs: int) -> dict[str, Any]:
    return measure_time(rows, pairs) if kind == "time" else measure_memory(kind, rows)


def inputs(rows: int) -> tuple[Any, Any, Any]:
    import torch

    torch.manual_seed(0)
    hidden_TD = torch.randn(rows, HIDDEN).bfloat16().requires_grad_()
    weight_VD = (torch.randn(VOCABULARY, HIDDEN) * 0.05).bfloat16().requires_grad_()
    return hidden_TD, weight_VD, torch.randint(VOCABULARY, (rows,))


def pass_of(kind: str, hidden_TD: Any, weight_VD: Any, targets_T: Any) -> Callable[[], None]:
    from rollcast_learners.head import scores

    def once() -> None:
        hidden_TD.grad = weight_VD.grad = None
        found = scores(hidden_TD, weight_VD, targets_T, 1.0, kind)  # type: ignore[arg-type]
        (found.logprobs_T - 0.01 * found.entropy_T).sum().backward()

    return once


def measure_memory(kind: str, rows: int) -> dict[str, Any]:
    columns = inputs(rows)
    small = [columns[0][:1].detach().requires_grad_(), *columns[1:2], columns[2][:1]]
    pass_of(kind, *small)()  # Threads and kernels are made before anything is counted.
    columns[1].grad = None
    before = resident_mib()
    pass_of(kind, *columns)()
    gradients = sum(column.grad.numel() * column.grad.element_size() for column in columns[:2])
    return {"peak_mib": peak_mib() - before, "gradients_mib": round(gradients / 2**20)}


def measure_time(rows: int, pairs: int) -> dict[str, Any]:
    columns = inputs(rows)
    passes = {kind: pass_of(kind, *columns) for kind in KINDS}
    turns = Turns(passes, pairs)
    return {
        **turns.seconds(),
        "chunked_over_naive": turns.ratio("chunked", "naive"),
        "quality": {kind: quality(kind, *columns) for kind in KINDS},
    }


def quality(kind: str, hidden_TD: Any, weight_VD: Any, targets_T: Any) -> dict[str, float]:
    """Largest difference to float64, over the first rows."""
    from rollcast_learners.head import scores

    rows_TD, targets_T = hidden_TD[:CHECKED_ROWS].detach(), targets_T[:CHECKED_ROWS]
    found = scores(rows_TD, weight_VD.detach(), targets_T, 1.0, kind)  # type: ignore[arg-type]
    exact = scores(rows_TD.double(), weight_VD.detach().double(), targets_T, 1.0, "naive")
    return {
        "logprobs": (found.logprobs_T - exact.logprobs_T).abs().max().item(),
        "entropy": (found.entropy_T - exact.entropy_T).abs().max().item(),
    }


if __name__ == "__main__":
    main()
