"""Continual learning: rounds of training, each from the best policy of a run on fresh data and feedback, and a gate.

Owns: when a round begins, what it begins from, whether its policy is better than the one before, and putting a better
one into the run that is served (docs/continual.md). Does not know how a run trains (`train.py`) or is served.

A round is a run of its own, with versions of its own. Where its policy passes the gate, it is published in the run that
is served, under that run's next version: whoever serves it takes it in like any other, and a rollback is possible.
"""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rollcast import best, metrics
from rollcast.config import EnvSection, RunConfig
from rollcast.errors import UsageError
from rollcast.export import Report, export, newest_published, read_published, settings_of
from rollcast.plan import run_directory
from rollcast.rundir import RunDir, write_atomic
from rollcast.runs import Source, read_json, state_of
from rollcast.session import StopRequest
from rollcast.train import train
from rollcast.weights import save_policy
from rollcast_learners.types import Weights

FEEDBACK_ENV = "rollcast/Feedback-v0"
LEAST_RATINGS = 20
"""Ratings without which the live metric says nothing yet."""
LOOK_EVERY_S = 30.0


# ---- when a round begins, and whether it was worth it


@dataclass(frozen=True)
class Schedule:
    """When rounds begin: `every_s` after the one before began, and when the live rating is lower than `below`."""

    every_s: float | None
    below: float | None


@dataclass(frozen=True)
class Live:
    """The live metric since the last round began: mean rating in [0, 1], and of how many answers."""

    rating: float
    count: int


def due(schedule: Schedule, now: float, began: float | None, live: Live) -> str | None:
    """Why a round begins now, if one does; `began` is when the last one did, None before the first. Pure."""
    if began is None:
        return "it is the first"
    if schedule.every_s is not None and now - began >= schedule.every_s:
        return f"the last one began {now - began:.0f} s ago"
    if schedule.below is not None and live.count >= LEAST_RATINGS and live.rating < schedule.below:
        return f"the live rating fell to {live.rating:.3f} ({live.count} ratings)"
    return None


@dataclass(frozen=True)
class Verdict:
    """What the gate says of a round. `before` and `after` are the same figure of the old and the new policy."""

    better: bool
    why: str
    metric: str | None = None
    before: float | None = None
    after: float | None = None


def judged(kept: dict[str, Any] | None, rows: list[dict[str, Any]], margin: float) -> Verdict:
    """The gate: the round's best policy against the one it began from, on the same questions. Pure.

    `kept` is the round's best.json, `rows` its metrics; that of step 0 has the figure of the policy it began from.
    """
    if kept is None:
        return Verdict(False, "no evaluation chose a best policy")
    metric, after = str(kept["metric"]), float(kept["value"])
    before = next((row.get(f"eval/{metric}") for row in rows if row["step"] == 0), None)
    if before is None:
        return Verdict(False, "the policy it began from was not measured", metric, None, after)
    better = int(kept["step"]) > 0 and after > before + margin
    needed = f" by more than {margin:g}" if margin else ""
    why = f"{metric} {before:.4f} -> {after:.4f}, {'better' if better else 'not better'}{needed}"
    return Verdict(better, why, metric, float(before), after)


# ---- one round


def prepare(config: RunConfig, source: RunDir, folder: RunDir, report: Report) -> RunConfig:
    """What a run from `source` trains with: its best policy, exported to `base/`, and its feedback in `feedback.jsonl`.

    Done once: a round that goes on has them already. Raises `RollcastError` when there is no policy or no feedback.
    """
    folder.create()
    origin = folder.base / "origin.json"
    if not origin.is_file():
        shutil.rmtree(folder.base, ignore_errors=True)
        done = export(Source(source), folder.base, None, settings_of(source), report)
        said = asdict(done) | {"path": str(source.path), "best": best.read(source), "time": time.time()}
        write_atomic(origin, json.dumps(said, indent=2) + "\n")
        report(f"{folder.path.name} begins with {source.path.name}'s policy version {done.policy_version}")
    elif read_json(origin).get("path") != str(source.path):
        why = f"{folder.base} holds the policy of {read_json(origin).get('path')}."
        raise UsageError(f"The run {folder.path.name} began from another run.", why, "Choose another name with --run.")
    model = config.model.model_copy(update={"path": str(folder.base)})
    envs = tuple(_with_feedback(env, source, folder, report) for env in config.env)
    return config.model_copy(update={"model": model, "env": envs})


def _with_feedback(env: EnvSection, source: RunDir, folder: RunDir, report: Report) -> EnvSection:
    """`rollcast/Feedback-v0` without data plays what people said of `source`."""
    if env.id != FEEDBACK_ENV or "data" in env.kwargs:
        return env
    from rollcast.feedback_data import export_feedback

    file = folder.path / "feedback.jsonl"
    if not file.is_file():
        done = export_feedback(source, settings_of(source), file)
        report(f"{done.rows} judged questions of {source.path.name} in {file}")
    return env.model_copy(update={"kwargs": {**env.kwargs, "data": str(file)}})


def promote(winner: RunDir, target: RunDir) -> int:
    """Publishes the best policy of `winner` in the folder of `target`, as its next version and its best. That version.

    Raises `UsageError` while `target` is being trained, or for policies that do not fit its model.
    """
    if state_of(target) == "running":
        why = "Its trainer gives out the versions."
        raise UsageError(f"The run {target.path.name} is being trained.", why, "Promote when it has ended.")
    kept = best.read(winner)
    if kept is None:
        raise UsageError(f"The run {winner.path.name} has no best policy.", "None was chosen.", "Set eval.best_metric.")
    policy, there = read_published(winner.best), newest_published(target)
    if there is not None and _form(policy) != _form(there):
        why = "Kind, names, shapes or types of its tensors differ, as with adapters published apart from their model."
        raise UsageError(f"{winner.path.name}'s policy does not fit {target.path.name}.", why, "Serve it by itself.")
    version = target.high_water_mark() + 1
    target.raise_high_water_mark(version)
    save_policy(policy, Path(policy.folder), target.published(version), version)
    last_step = max((int(row["step"]) for row in metrics.read(target.metrics)), default=0)
    said = {**kept, "step": last_step, "policy_version": version, "from": winner.path.name}
    best.keep(target, said, lambda folder: save_policy(policy, Path(policy.folder), folder, version))
    target.forget_published_but(version)
    return version


def _form(weights: Weights) -> tuple[str, set[tuple[str, str, tuple[int, ...]]]]:
    return weights.kind, {(entry.name, entry.dtype, tuple(entry.shape)) for entry in weights.manifest}


# ---- round after round


def train_from(config: RunConfig, source: RunDir, resume: str, report: Report) -> None:
    """One run from `source`, or with a schedule round after round, until it is stopped or `run.rounds` are done."""
    schedule = Schedule(config.run.every_s, config.run.below)
    if schedule == Schedule(None, None):
        folder = RunDir(run_directory(config))
        train(prepare(config, source, folder, report), folder.path, resume)
        return
    stop = StopRequest(report)
    number = 1
    while config.run.rounds == 0 or number <= config.run.rounds:
        folder = round_folder(config, number)
        if not folder.verdict.is_file():
            if not _wait_until_due(schedule, config, number, source, stop, report):
                return
            if not _round(config, source, number, report):
                report(f"{folder.path.name} was stopped; the same command goes on with it")
                return
        number += 1


def round_folder(config: RunConfig, number: int) -> RunDir:
    """The folder of a round, the first being 1."""
    whole = run_directory(config)
    return RunDir(whole.with_name(f"{whole.name}-{number}"))


def _round(config: RunConfig, source: RunDir, number: int, report: Report) -> bool:
    """A round to its verdict; False when it was stopped before."""
    folder = round_folder(config, number)
    run = config.run.model_copy(update={"name": folder.path.name, "seed": config.run.seed + number})
    train(prepare(config.model_copy(update={"run": run}), source, folder, report), folder.path, "auto")
    rows = metrics.read(folder.metrics)
    if not _ended(rows, config):
        return False
    verdict = judged(best.read(folder), rows, config.run.margin)
    version = promote(folder, source) if verdict.better else None
    report(f"{folder.path.name}: {verdict.why}" + (f"; published as version {version}" if verdict.better else ""))
    write_atomic(folder.verdict, json.dumps(asdict(verdict) | {"version": version, "time": time.time()}) + "\n")
    return True


def _ended(rows: list[dict[str, Any]], config: RunConfig) -> bool:
    """Whether the round is over: all steps done, or out of patience."""
    if not rows:
        return False
    if rows[-1]["step"] >= config.run.steps:
        return True
    measured = [row[f"eval/{config.eval.best_metric}"] for row in rows if f"eval/{config.eval.best_metric}" in row]
    since = len(measured) - 1 - measured.index(max(measured)) if measured else 0
    return 0 < config.eval.patience <= since


def _wait_until_due(
    schedule: Schedule, config: RunConfig, number: int, source: RunDir, stop: StopRequest, report: Report
) -> bool:
    """False when the loop was asked to stop meanwhile. A round that had begun goes on at once."""
    if round_folder(config, number).run_json.is_file():
        return True
    began = _began(round_folder(config, number - 1)) if number > 1 else None
    with stop.listening():
        told = False
        while stop.signal is None:
            why = due(schedule, time.time(), began, _live(schedule, source, began))
            if why is not None:
                report(f"round {number} begins: {why}")
                return True
            if not told:
                report(f"round {number} waits")
                told = True
            _sleep(schedule, began, lambda: stop.signal is not None)
    return False


def _sleep(schedule: Schedule, began: float | None, stopped: Callable[[], bool]) -> None:
    left = LOOK_EVERY_S if schedule.every_s is None else (began or 0.0) + schedule.every_s - time.time()
    until = time.monotonic() + min(max(left, 0.0), LOOK_EVERY_S)
    while time.monotonic() < until and not stopped():
        time.sleep(min(0.2, max(until - time.monotonic(), 0.0)))


def _began(folder: RunDir) -> float:
    return float(read_json(folder.base / "origin.json").get("time", 0.0))


def _live(schedule: Schedule, source: RunDir, began: float | None) -> Live:
    if schedule.below is None:
        return Live(0.0, 0)
    from rollcast.feedback_data import live_rating
    from rollcast.live.feedback_store import read
    from rollcast.live.feedback_tables import database_of, open_to_read

    settings = settings_of(source).feedback
    if settings.url is None and not source.feedback.is_file():
        return Live(0.0, 0)  # It was not served yet.
    engine = open_to_read(database_of(source, settings))
    try:
        return Live(*live_rating(read(engine, rated_only=True, since=began or 0.0)))
    finally:
        engine.dispose()
