"""`rollcast tune`: a search over settings on Ray Tune; each trial is a run of `rollcast train` like any other.

Owns: the search space as Ray Tune wants it, starting, hearing and ending the run of a trial, and the table and the plot
of all trials. Does not know what a setting means, how a run learns, or what folds are (`folds.py`).

The folder of the search holds one run folder a trial, so that `rollcast status`, `rollouts` and `export` look into
each. A trial reserves nothing of the cluster itself: its run asks for workers and learners.
"""

import ctypes
import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from rollcast import cluster, metrics
from rollcast.config import RunConfig
from rollcast.config_file import load_config
from rollcast.config_tune import Span
from rollcast.display import harmless, table
from rollcast.errors import RunFailed, UsageError
from rollcast.folds import Member, Point, members_of, outcome, parts_of, refuse_uncut
from rollcast.plot import TrialCurve, trial_curves
from rollcast.rundir import RunDir, write_atomic
from rollcast.session import resolved

Report = Callable[[str], None]

POLL_S = 0.5
ENDS_WITHIN_S = 120.0
"""A trial that is ended early has so long to save its checkpoint."""
PARENT_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of Linux's prctl."""


@dataclass(frozen=True)
class Trial:
    """One combination and what became of it. Search -> table, plot and trials.json."""

    name: str
    settings: dict[str, Any]
    state: str
    """`done`, `ended early`, or `failed: ...`."""
    best: float | None
    """The highest figure of `points`: what trials are ranked by."""
    last: float | None
    seconds: float
    runs: list[str]
    points: list[Point] = field(repr=False)
    """Step and figure at each evaluation; the mean over folds, or seeds, where there are several."""
    each: list[float | None] = field(default_factory=list)
    """The figure of each fold, or without folds of each seed, at the best step; None for one that did not get there."""
    spread: float | None = None
    """Standard deviation of `each` (n - 1)."""
    parts: str = ""
    """What `each` is of: `fold`, `seed`, or nothing for a sole run."""


def tune(config: RunConfig, folder: Path, report: Report) -> list[Trial]:
    """Runs the search in `folder` and returns its trials, the best first. What is complete is not run again.

    Raises `UsageError` without a space, `ConfigError` for a combination that no run would take, `RunFailed` when every
    trial failed.
    """
    metric = _metric(config)
    combinations = list(_combinations(config))
    folder.mkdir(parents=True, exist_ok=True)
    base = folder / "base.toml"
    base.write_text(resolved(config).to_toml(), encoding="utf-8")
    named = {f"trial{number:03d}": settings for number, settings in enumerate(combinations)}
    # What a run would refuse is told before the first one starts.
    refuse_uncut([load_config(base, _overrides(settings)) for settings in named.values()])
    report(f"{len(named)} trials of {', '.join(config.tune.space)}, by {metric}; runs are in {folder}")
    with cluster.connected(config) as address:
        plan = Plan(str(base), str(folder), os.getcwd(), metric, address, config.run.steps, parts_of(config))
        trials = _searched(config, named, plan, report)
    ranked = sorted(trials, key=_rank)
    write_atomic(folder / "trials.json", json.dumps([asdict(trial) for trial in ranked], indent=2) + "\n")
    curves = [TrialCurve(_label(trial), trial.points, trial.best, trial.spread) for trial in ranked]
    trial_curves(curves, folder / "trials.png", config.run.name, metric.removeprefix("eval/"))
    if all(trial.best is None for trial in ranked):
        raise RunFailed("Every trial failed.", ranked[0].state, f"Look at {folder}/{ranked[0].runs[0]}/logs.")
    return ranked


@dataclass(frozen=True)
class Plan:
    """What a trial needs to know. Search -> trial's process."""

    base: str
    folder: str
    here: str
    """Where the command was typed: paths in arguments of environments may be relative to it."""
    metric: str
    address: str
    steps: int
    parts: str
    """As of a trial."""

    @property
    def last_step(self) -> int | None:
        """The evaluation that a fold has to reach to count; None where runs count as far as they come."""
        return self.steps if self.parts == "fold" else None


def _metric(config: RunConfig) -> str:
    """The figure that counts, as it stands in metrics.jsonl. Raises `UsageError` for a search that could not tell."""
    if not config.tune.space:
        why = "[tune] names no settings to vary."
        raise UsageError("There is nothing to search.", why, 'Add: [tune.space] "learner.learning_rate" = [1e-5, 3e-5]')
    if not config.eval.every:
        fix = "Set it to a number of steps."
        raise UsageError("A search needs evaluations.", "eval.every is 0: no trial is ever measured.", fix)
    return "eval/" + (config.tune.metric or config.eval.best_metric or f"{config.env[0].label}/reward")


# ---- the combinations


def _combinations(config: RunConfig) -> Iterator[dict[str, Any]]:
    """Every combination of a grid, or as many as the search draws; the same for the same seed."""
    space = config.tune.space
    if config.tune.search == "grid":
        for values in itertools.product(*space.values()):  # Spans are refused in a grid.
            yield dict(zip(space, values, strict=True))
        return
    for number in range(config.tune.trials):
        draw = random.Random(f"{config.run.seed}/tune/{number}")
        yield {key: _drawn(values, draw) for key, values in space.items()}


def _drawn(values: Span | Sequence[Any], draw: random.Random) -> Any:
    if not isinstance(values, Span):
        return draw.choice(list(values))
    whole = values.low == int(values.low) and values.high == int(values.high)
    if values.log:
        drawn = math.exp(draw.uniform(math.log(values.low), math.log(values.high)))
    else:
        drawn = draw.uniform(values.low, values.high)
    return round(drawn) if whole else float(f"{drawn:.4g}")


def _overrides(settings: Mapping[str, Any]) -> list[str]:
    return [f"--{key}={json.dumps(value)}" for key, value in settings.items()]


# ---- Ray Tune


def _searched(config: RunConfig, named: dict[str, dict[str, Any]], plan: Plan, report: Report) -> list[Trial]:
    from ray import tune as ray_tune
    from ray.tune.schedulers import ASHAScheduler

    early = None
    if config.tune.search == "asha":
        # Trials of folds are compared by the mean over as many complete ones, others at the same step.
        time, first, last = ("step", config.eval.every, config.run.steps)
        if plan.parts == "fold":
            time, first, last = "folds", 1, config.tune.folds
        early = ASHAScheduler(time_attr=time, max_t=last + 1, grace_period=first, reduction_factor=2)
    # Ray Tune starts a trial for each; the combinations are ours, so that every search draws the same way. A byte is
    # the least that a trial can reserve: the CPUs are for its run.
    members = {name: members_of(name, config) for name in named}
    choices = [
        {"name": name, "settings": s, "members": [asdict(m) for m in members[name]]} for name, s in named.items()
    ]
    tuner = ray_tune.Tuner(
        ray_tune.with_resources(_trainable(), {"cpu": 0, "memory": 1}),
        param_space={"trial": ray_tune.grid_search(choices), "plan": asdict(plan)},
        tune_config=ray_tune.TuneConfig(
            metric="figure", mode="max", scheduler=early, max_concurrent_trials=config.tune.concurrent
        ),
        run_config=ray_tune.RunConfig(
            name="ray", storage_path=plan.folder, verbose=0, callbacks=[_told(named, plan.metric, report)]
        ),
    )
    results = tuner.fit()
    errors = {result.config["trial"]["name"]: str(result.error) for result in results if result.error is not None}
    return [_trial(name, settings, members[name], plan, errors.get(name)) for name, settings in named.items()]


def _trainable() -> Any:
    """The class that Ray Tune runs in a process of its own; made late, since Ray Tune takes seconds to import."""
    from ray import tune as ray_tune

    class TrialRun(ray_tune.Trainable):  # type: ignore[misc]
        """One combination: its runs one after the other, and each evaluation told to the search."""

        def setup(self, config: dict[str, Any]) -> None:
            plan, trial = Plan(**config["plan"]), config["trial"]
            self.runs = TrialRuns(plan, [Member(**member) for member in trial["members"]], trial["settings"])

        def step(self) -> dict[str, Any]:
            point = self.runs.next_point()
            judged = self.runs.judged()
            if point is None:
                return {**judged, "done": True}
            return {**judged, "heard": {"run": self.runs.run, "step": point[0], "figure": point[1]}}

        def cleanup(self) -> None:
            self.runs.end()

    return TrialRun


def _told(named: Mapping[str, Any], metric: str, report: Report) -> Any:
    """A line for each evaluation of each trial."""
    from ray.tune import Callback

    class Told(Callback):  # type: ignore[misc]
        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **_: Any) -> None:
            heard = result.get("heard")
            if heard is not None and not result.get("done"):
                settings = named[trial.config["trial"]["name"]]
                shown = ", ".join(f"{key} = {value}" for key, value in settings.items())
                figure = f"{metric.removeprefix('eval/')} {heard['figure']:.3f}"
                report(f"{heard['run']}  step {heard['step']:>4}  {figure}  ({shown})")

    return Told()


class TrialRuns:
    """The runs of one combination, one after the other: processes of `rollcast train`, heard through metrics.jsonl."""

    def __init__(self, plan: Plan, members: Sequence[Member], settings: Mapping[str, Any]) -> None:
        self.plan = plan
        self.settings = settings
        self.members = members
        self.run = ""
        self.step, self.figure = 0, float("-inf")
        self._left = list(members)
        self._told_to = -1
        self._process: subprocess.Popen[bytes] | None = None
        self._folder = Path(plan.folder) / "none yet"

    def next_point(self) -> Point | None:
        """The next evaluation, once it is there; None after the last one of the last run."""
        while True:
            ended = self._process is None or self._process.poll() is not None
            for step, figure in points_of(self._folder, self.plan.metric):
                if step > self._told_to:
                    self._told_to, self.step, self.figure = step, step, figure
                    return step, figure
            if not ended:
                time.sleep(POLL_S)
                continue
            self._finish()
            if not self._left:
                return None
            self._start(self._left.pop(0))

    def judged(self) -> dict[str, float]:
        """What trials are compared by: the last evaluation, or with folds the mean over those that are complete."""
        if self.plan.parts != "fold":
            return {"step": self.step, "figure": self.figure}
        found = outcome(self.members, curves_of(self.members, self.plan), self.plan.last_step, failed=False)
        complete = sum(value is not None for value in found.each)
        return {"folds": complete, "figure": self.figure if found.best is None else found.best}

    def _start(self, member: Member) -> None:
        self.run, self._told_to = member.run, -1
        self._folder = Path(self.plan.folder) / member.run
        if any(row["step"] == self.plan.steps for row in metrics.read(RunDir(self._folder).metrics)):
            return  # Made by an earlier search: only its figures are told.
        where = ["--run", member.run, f"--run.dir={self.plan.folder}"]
        words = ["train", self.plan.base, *where, *member.overrides, *_overrides(self.settings)]
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / "output.log").open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "rollcast", *words],
                cwd=self.plan.here,
                env={**os.environ, "RAY_ADDRESS": self.plan.address},
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=_end_with_parent,
            )

    def _finish(self) -> None:
        code, self._process = (self._process.returncode if self._process is not None else 0), None
        if code:
            tail = (self._folder / "output.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()[-4:]
            which = f"{self.run}: " if len(self.members) > 1 else ""
            raise RuntimeError(f"{which}exit code {code}: {' | '.join(tail)}")

    def end(self) -> None:
        """Asks a run that still goes on to save and end."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(ENDS_WITHIN_S)
            except subprocess.TimeoutExpired:
                self._process.kill()


def _end_with_parent() -> None:
    """Linux sends SIGTERM when the process that started this one dies: a killed trial leaves no run behind."""
    ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGTERM)


def points_of(folder: Path, metric: str) -> list[Point]:
    """Step and figure of every evaluation of a run."""
    return [(row["step"], row[metric]) for row in metrics.read(RunDir(folder).metrics) if metric in row]


# ---- what came of it


def curves_of(members: Sequence[Member], plan: Plan) -> list[list[Point]]:
    """The evaluations of each run, as far as it came."""
    return [points_of(Path(plan.folder) / member.run, plan.metric) for member in members]


def _trial(name: str, settings: dict[str, Any], members: Sequence[Member], plan: Plan, error: str | None) -> Trial:
    curves = curves_of(members, plan)
    complete = all(curve and curve[-1][0] == plan.steps for curve in curves)
    state = "done" if complete else "ended early"
    if error is not None and not complete:
        state = f"failed: {error.strip().splitlines()[-1]}"
    found = outcome(members, curves, plan.last_step, state.startswith("failed"))
    last = found.points[-1][1] if found.points else None
    runs = [member.run for member in members]
    seconds = sum(_seconds(RunDir(Path(plan.folder) / run)) for run in runs)
    return Trial(
        name, settings, state, found.best, last, seconds, runs, found.points, found.each, found.spread, plan.parts
    )


def _seconds(run: RunDir) -> float:
    """From the first row of its figures to the last."""
    times = [row["time"] for row in metrics.read(run.metrics)]
    return max(times) - min(times) if times else 0.0


def _rank(trial: Trial) -> tuple[int, float]:
    """The best first; after those of more folds come those of fewer, and then those without a figure."""
    if trial.best is None:
        return 1, 0.0
    return -sum(value is not None for value in trial.each), -trial.best


def _label(trial: Trial) -> str:
    return ", ".join(
        f"{key} {_value(value)}" for key, value in zip(_short_keys(trial), trial.settings.values(), strict=True)
    )


def _short_keys(trial: Trial) -> list[str]:
    """Settings without their section, where that leaves them apart."""
    short = [key.rpartition(".")[2] for key in trial.settings]
    return [name if short.count(name) == 1 else key for name, key in zip(short, trial.settings, strict=True)]


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def show(trials: Sequence[Trial], console: Console) -> None:
    """The table, the best trial first; with folds or seeds the mean, the spread and the figure of each. Then what
    failed, and why."""
    keys = _short_keys(trials[0]) if trials else []
    parts = trials[0].parts if trials else ""
    figures = ("mean", "sd", f"each {parts}") if parts else ("best",)
    numbers = (*keys, *figures, "last", "seconds")
    rows = table(console, "trial", *numbers, "state", right=numbers)
    for trial in trials:
        told = (_figure(trial.best), _figure(trial.spread), "  ".join(_figure(value, 3) for value in trial.each))
        row = (
            *map(_value, trial.settings.values()),
            *told[: len(figures)],
            _figure(trial.last),
            f"{trial.seconds:.0f}",
        )
        rows.add_row(trial.name, *row, trial.state.partition(":")[0])
    console.print(rows)
    for trial in trials:
        if trial.state.startswith("failed"):
            console.print(harmless(f"{trial.name} {trial.state}"), style="red")


def _figure(value: float | None, places: int = 4) -> str:
    return "-" if value is None else f"{value:.{places}f}"
