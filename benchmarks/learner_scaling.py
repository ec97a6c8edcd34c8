"""What a second learner process brings: useful tokens a second of a learning step. Prints JSON.

    python benchmarks/learner_scaling.py [--rounds 5] [--write]

Three groups of learners take turns on the same samples, each learner with one thread: one learner, two that hold the
whole policy each, and two that share it out (`learner.sharding = "fsdp"`). A figure is the median of the rounds'
ratios; the first round is left out, since it allocates the optimisers' moments. `quality` holds the groups to each
other in what they learned from the same start: the loss, and the log-probabilities of the trained tokens. `shares`
tells how evenly the tokens of a step fall to two learners, which bounds what a second one can bring.
"""

import argparse
import os
import resource
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
from learner import MODEL, model_folder, samples, with_old_logprobs
from measuring import Turns, finish, machine

from rollcast.cluster import ENVIRONMENT
from rollcast_learners import sharding
from rollcast_learners.batch import Batch, collate
from rollcast_learners.learner import StepResult
from rollcast_learners.policy import Policy, PolicySettings
from rollcast_learners.rllib import Learners, LearnerSpec, LMLearner
from rollcast_learners.settings import CorrectionSettings, KLSettings, LearnerSettings

SIDES: dict[str, dict[str, Any]] = {
    "one": {"num_learners": 1},
    "two": {"num_learners": 2},
    "two_sharded": {"num_learners": 2, "sharding": "fsdp"},
}
GROUPS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="also write benchmarks/results/learner_scaling-DATE.json")
    parser.add_argument("--model", default=str(MODEL))
    options = parser.parse_args()
    figures = machine(threads=1)
    with tempfile.TemporaryDirectory(prefix="rc-", dir="/tmp") as folder:
        count = sum(side["num_learners"] for side in SIDES.values())
        start = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR", "_temp_dir": folder}
        ray.init(address="local", num_cpus=count, runtime_env={"env_vars": ENVIRONMENT}, **start)
        try:
            figures |= measure(model_folder(options.model, Path(folder) / "model"), options.rounds)
        finally:
            ray.shutdown()
    finish("learner_scaling", figures | {"load_average_after": os.getloadavg()[0]}, options.write)


def measure(model: str, rounds: int) -> dict[str, Any]:
    trajectories = with_old_logprobs(Scoring(model), samples(GROUPS))
    batch = collate(trajectories)
    useful = sum(len(item.streams[0].token_ids_T) for item in trajectories)
    groups = {name: Learners(spec(model, settings)) for name, settings in SIDES.items()}
    try:
        return take_turns(groups, batch, useful, rounds) | {"shares": shares(batch)}
    finally:
        for learners in groups.values():
            learners.close()


class Scoring:
    """A policy for as long as the samples' log-probabilities are made."""

    def __init__(self, model: str) -> None:
        self.policy = Policy(PolicySettings(model))


def spec(model: str, settings: dict[str, Any]) -> LearnerSpec:
    learner = LearnerSettings(cpus_per_learner=1, **settings)
    run = {"temperature": 1.0, "total_steps": 1000, "answer_tokens": 32, "seed": 0}
    return LearnerSpec(PolicySettings(model), learner, KLSettings(), CorrectionSettings(), **run)


def take_turns(groups: dict[str, Learners], batch: Batch, useful: int, rounds: int) -> dict[str, Any]:
    results: dict[str, list[StepResult]] = {name: [] for name in groups}
    sides = {name: partial(step, learners, batch, results[name]) for name, learners in groups.items()}
    turns = Turns(sides, rounds, cpu_seconds=lambda name: groups[name].cpu_seconds())
    return {
        "samples": batch.episodes,
        "useful_tokens": useful,
        "rows": batch.tokens,
        **turns.seconds(),
        "useful_tokens_per_s": {name: round(useful / s) for name, s in turns.seconds()["wall_s"].items()},
        # How many times as fast as one, and the CPU seconds that one takes, as a share of theirs.
        **{f"{name}_over_one": turns.ratio("one", name) for name in ("two", "two_sharded")},
        "memory_mib_a_learner": {name: memory(learners) for name, learners in groups.items()},
        "quality": {name: compare(results["one"], results[name]) for name in ("two", "two_sharded")},
    }


def step(learners: Learners, batch: Batch, results: list[StepResult]) -> None:
    results.append(learners.step(batch))


def memory(learners: Learners) -> dict[str, int]:
    """Of the learner that has most."""
    return {
        "weights_masters_moments_gradients": max(learners._each(kept_bytes)) >> 20,
        "peak": max(learners._each(peak_mib)),
    }


def peak_mib(_: LMLearner) -> int:
    """This file's functions travel to a learner as code, those of the file beside it would not."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def kept_bytes(learner: LMLearner) -> int:
    """Counted, not estimated: what the policy and its optimiser hold between steps, memory they share once."""
    optimizer = learner.core.optimizer
    moments = [v for state in optimizer.adamw.state.values() for v in state.values()]
    weights = [sharding.local(p) for p in learner.core.policy.parameters()]
    kept = {t.data_ptr(): t.nbytes for t in (*weights, *optimizer.masters, *moments, optimizer.flat) if t.numel()}
    return sum(kept.values())


def compare(one: list[StepResult], two: list[StepResult]) -> dict[str, Any]:
    """In the first and the last step, as each sees the samples before its own update: the first has the same weights.

    In the last, bfloat16 has rounded several updates of another order of sums, on random tokens of probability near 0.
    What is exact is held in float32, to 1e-5, by tests/learners/test_sharding.py.
    """
    told = {}
    for name, step in (("first_step", 0), ("last_step", -1)):
        gaps = np.abs(np.concatenate([logprobs(one[step])[i] - logprobs(two[step])[i] for i in logprobs(one[step])]))
        metrics = one[step].metrics, two[step].metrics
        told[name] = {
            "logprob_difference_mean": round(float(gaps.mean()), 5),
            "logprob_difference_max": round(float(gaps.max()), 5),
            **{f"{key}_difference": abs(metrics[0][key] - metrics[1][key]) for key in ("loss/policy", "loss/value")},
        }
    return told


def logprobs(result: StepResult) -> dict[int, Any]:
    """Of each episode, from whichever learner had it."""
    return {
        int(index): part
        for details in result.details
        for index, part in zip(
            details.index_E, np.split(details.logprobs_N, np.cumsum(details.length_E)[:-1]), strict=True
        )
    }


def shares(batch: Batch) -> dict[str, Any]:
    """How a step falls to two learners."""
    parts = batch.shares(2)
    columns = {"rows": [p.tokens for p in parts], "trained_tokens": [p.trained_tokens for p in parts]}
    worst = {name: round(max(values) / (sum(values) / 2) - 1, 3) for name, values in columns.items()}
    return {**columns, "largest_over_mean_less_one": worst}


if __name__ == "__main__":
    main()
