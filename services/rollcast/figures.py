"""Figures of one step, from what was played for it and where the time went: pure functions to names and numbers.

Owns: names of these figures. Does not know who records them, or what the learner made of the batch.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean, pstdev

from rollcast.intake import Loaded
from rollcast.worker import Occupation
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


def of_time(lap: Mapping[str, float], seconds: float, samples: int, rows: int) -> dict[str, float]:
    """Where the `seconds` since the last row went, and what was done in them: `lap` has the seconds of each stage."""
    told = {f"time/{stage.replace(' ', '_')}_s": spent for stage, spent in lap.items()}
    running = max(seconds - lap.get("paused", 0.0), 1e-6)
    if "learn" in lap:
        told["samples_per_s"] = samples / running
        told["learner/tokens_per_s"] = rows / lap["learn"]
        told["busy/learner"] = min(lap["learn"] / running, 1.0)
    return told


def of_workers(occupations: Sequence[Occupation], ready: int) -> dict[str, float]:
    """How busy the workers were, and how much `ready` of them sample a second."""
    busy, idle = sum(o.busy_s for o in occupations), sum(o.idle_s for o in occupations)
    if busy + idle <= 0:
        return {}
    tokens = sum(o.tokens for o in occupations)
    return {"busy/rollout": busy / (busy + idle), "rollout/tokens_per_s": tokens / (busy + idle) * ready}


def of_loads(loaded: Sequence[Loaded]) -> dict[str, float]:
    """What the policies that workers took in cost, and how far their probes were off."""
    if not loaded:
        return {}
    return {
        "sync/load_s": fmean(one.load_s for one in loaded),
        "sync/pause_s": fmean(one.pause_s for one in loaded),
        "sync/pull_s": fmean(one.pull_s for one in loaded),
        "logprob_gap/mean": max(one.gap_mean for one in loaded if one.gap_mean is not None),
        "logprob_gap/max": max(one.gap_max for one in loaded if one.gap_max is not None),
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
