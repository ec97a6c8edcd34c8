"""The runs of one combination of a search: a fold of the data or a seed each; and the figure that they make together.

Owns: names and settings of those runs, the mean and the spread over folds or seeds, and which environments can be cut
into folds. Does not know how a run is started (`tune.py`) nor how data are cut (`rollcast_envs.splits`).
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rollcast.config import EnvSection, RunConfig
from rollcast.errors import ConfigError
from rollcast.evaluate import made_once, takes_split
from rollcast_envs.splits import fold_names

Point = tuple[int, float]


@dataclass(frozen=True)
class Member:
    """One run of a combination. Config -> trial."""

    run: str
    """Name of the run and of its folder."""
    part: int
    """Which of the parts that are compared it belongs to, from 0: its fold, or without folds its seed."""
    overrides: tuple[str, ...]


def members_of(name: str, config: RunConfig) -> list[Member]:
    """The runs of the combination `name`, in their order: all seeds of a fold, then the next fold."""
    folds, seeds = max(config.tune.folds, 1), config.tune.seeds
    found = []
    for fold in range(folds):
        for seed in range(seeds):
            run = name + f"-fold{fold + 1}of{folds}" * (folds > 1) + f"-seed{seed}" * (seeds > 1)
            words = [f"--run.seed={config.run.seed + seed}", *(_fold_words(config, fold + 1) if folds > 1 else ())]
            found.append(Member(run, fold if folds > 1 else seed, tuple(words)))
    return found


def parts_of(config: RunConfig) -> str:
    """What the runs of a combination differ in: `fold`, `seed`, or nothing."""
    return "fold" if config.tune.folds > 1 else "seed" if config.tune.seeds > 1 else ""


def _fold_words(config: RunConfig, fold: int) -> list[str]:
    rest, held_out = fold_names(fold, config.tune.folds)
    trained = [f"--env.{number}.kwargs.split={json.dumps(rest)}" for number in range(len(config.env))]
    return [*trained, f"--eval.split={held_out}", "--tune.folds=0"]  # To a run itself, folds say nothing.


@dataclass(frozen=True)
class Outcome:
    """The figures of a combination. Curves of its runs -> trial."""

    points: list[Point]
    """The mean over parts at each evaluation."""
    best: float | None
    """The highest of these means."""
    each: list[float | None]
    """Every part's figure at that evaluation; None for one that does not count."""
    spread: float | None
    """Their standard deviation (n - 1); None for fewer than two."""


def outcome(
    members: Sequence[Member], curves: Sequence[Sequence[Point]], last_step: int | None, failed: bool
) -> Outcome:
    """What the runs found, given the evaluations of each.

    Parts count as far as they came, or with `last_step` only those that came to it. Where a run of several failed there
    is no mean: that of the others would be of other data.
    """
    parts = [_mean(_of_part(members, curves, part)) for part in dict.fromkeys(member.part for member in members)]
    counts = [bool(curve) and last_step in (None, curve[-1][0]) for curve in parts]
    points = _mean([curve for curve, counted in zip(parts, counts, strict=True) if counted])
    if not points:
        return Outcome([], None, [None for _ in parts], None)
    at = max(range(len(points)), key=lambda place: points[place][1])
    each = [curve[at][1] if counted else None for curve, counted in zip(parts, counts, strict=True)]
    if failed and len(members) > 1:
        return Outcome([], None, each, None)
    known = [value for value in each if value is not None]
    return Outcome(points, points[at][1], each, statistics.stdev(known) if len(known) > 1 else None)


def _of_part(members: Sequence[Member], curves: Sequence[Sequence[Point]], part: int) -> list[Sequence[Point]]:
    return [curve for member, curve in zip(members, curves, strict=True) if member.part == part]


def _mean(curves: Sequence[Sequence[Point]]) -> list[Point]:
    """The mean of the figures at each evaluation that all curves have."""
    return [(row[0][0], sum(value for _, value in row) / len(row)) for row in zip(*curves, strict=False)]


def refuse_uncut(configs: Sequence[RunConfig]) -> None:
    """Makes every environment with every fold. Raises `ConfigError` where one cannot be cut, or a part is empty."""
    folds = {config.tune.folds for config in configs if config.tune.folds > 1}
    envs = {json.dumps([env.id, env.kwargs], sort_keys=True, default=repr): env for c in configs for env in c.env}
    for env in envs.values() if folds else ():
        made = made_once(env, env.kwargs)
        knows = takes_split(env) and getattr(made.unwrapped, "folds", False)
        made.close()
        if not knows:
            raise _uncut(env)
        for split in (name for count in folds for part in range(count) for name in fold_names(part + 1, count)):
            made_once(env, {**env.kwargs, "split": split}).close()


def _uncut(env: EnvSection) -> ConfigError:
    return ConfigError(
        f"{env.label} cannot be cut into folds.",
        f"{env.id} knows no parts of its train split, or has no data that could be cut.",
        "Set tune.folds to 0; or, where it is yours, choose its tasks with rollcast_envs.splits.in_split and set "
        "folds = True (docs/environments.md).",
    )
