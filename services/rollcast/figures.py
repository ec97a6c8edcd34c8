"""Figures of one learner step, from what was played for it: pure functions from trajectories to names and numbers.

Owns: names of the figures of a batch. Does not know who records them, or what the learner made of the batch.
"""

from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean, pstdev

from rollcast_learners.types import Trajectory


def of_batch(trajectories: Sequence[Trajectory], version: int, trained: int, rows: int) -> dict[str, float]:
    """Rewards, ages and tokens of the samples that one step learns from, when `version` is the published policy."""
    rewards = [t.reward for t in trajectories]
    ages = [version - t.versions[0] for t in trajectories]
    return {
        "reward/mean": fmean(rewards),
        "reward/std": pstdev(rewards),
        "staleness/mean": fmean(ages),
        "staleness/max": float(max(ages)),
        "tokens/trained": float(trained),
        "tokens/useful_ratio": trained / rows,
        **_parts(trajectories),
        **_reward_seconds(trajectories),
    }


def _parts(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """`reward_of/<env>/total` and `reward_of/<env>/<part>`: each environment and each part of its reward apart."""
    by_env: dict[str, list[Trajectory]] = defaultdict(list)
    for trajectory in trajectories:
        by_env[trajectory.prompt.label].append(trajectory)
    found: dict[str, float] = {}
    for env, played in by_env.items():
        found[f"reward_of/{env}/total"] = fmean(t.reward for t in played)
        for part in sorted({name for t in played for name in t.parts}):
            found[f"reward_of/{env}/{part}"] = fmean(t.parts.get(part, 0.0) for t in played)
    return found


def _reward_seconds(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """`reward_s/<function>/mean` and `.../max`: what the user's reward functions cost."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for trajectory in trajectories:
        for name, spent in trajectory.reward_seconds.items():
            seconds[name].append(spent)
    means = {f"reward_s/{name}/mean": fmean(spent) for name, spent in seconds.items()}
    return means | {f"reward_s/{name}/max": max(spent) for name, spent in seconds.items()}
