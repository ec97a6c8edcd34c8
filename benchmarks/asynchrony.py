"""Synchronous against asynchronous: one configuration with `max_staleness` 0 and 2, in turn, at equal cores.

    python benchmarks/asynchrony.py --pairs 3 [--workloads lognormal multiturn] [--write]

The two workloads are those of `end_to_end.py` in which somebody waits: for answers of very unequal length, and for an
environment that takes 100 ms a step. Both sides are rollcast with all else equal; a run is timed from the end of its
first steps. Beside the speed stand the share of the time that learner and engine were busy, the age of the samples, and
what the samples of the window were worth.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

from end_to_end import WORKLOADS, ours, prepare, ratios
from measuring import finish, machine

STALENESS = {"asynchronous": 2, "synchronous": 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=["lognormal", "multiturn"])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--write", action="store_true", help="also write benchmarks/results/asynchrony-DATE.json")
    options = parser.parse_args()
    figures = machine()
    for name in options.workloads:
        pairs = [in_turn(name, number, options.steps) for number in range(options.pairs)]
        figures[name] = {"asynchronous_over_synchronous": ratios(pairs, "asynchronous", "synchronous"), "pairs": pairs}
    finish("asynchrony", figures, options.write)


def in_turn(name: str, number: int, steps: int) -> dict[str, Any]:
    workload = WORKLOADS[name]
    with tempfile.TemporaryDirectory(prefix="rollcast-bench-") as folder:
        prepare(workload, Path(folder))
        return {
            side: ours(
                f"{side}-{os.getpid()}-{number}", workload, steps, Path(folder), "--buffer.max_staleness", str(allowed)
            )
            for side, allowed in STALENESS.items()
        }


if __name__ == "__main__":
    main()
