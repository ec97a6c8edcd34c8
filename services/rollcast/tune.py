"""`rollcast tune`: a search over settings on Ray Tune; each trial is a run of `rollcast train` like any other.

Owns: the search space as Ray Tune wants it, starting, hearing and ending the run of a trial, and the table and the plot
of all trials. Does not know what a setting means or how a run learns.

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
from rollcast.display import table
from rollcast.errors import RunFailed, UsageError
from rollcast.plot import trial_curves
from rollcast.rundir import RunDir, write_atomic
from rollcast.session import resolved

Report = Callable[[str], None]
Point = tuple[int, float]

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
    last: float | None
    seconds: float
    runs: list[str]
    points: list[Point] = field(repr=False)
    """Step and figure at each evaluation; the mean over seeds where there are several."""


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
    for settings in named.values():  # What a run would refuse is told before the first one starts.
        load_config(base, _overrides(settings))
    report(f"{len(named)} trials of {', '.join(config.tune.space)}, by {metric}; runs are in {folder}")
    with cluster.connected(config) as address:
        plan = Plan(str(base), str(folder), os.getcwd(), metric, address, config.run.steps, config.tune.seeds)
        trials = _searched(config, named, plan, report)
    ranked = sorted(trials, key=lambda trial: -(trial.best if trial.best is not None else float("-inf")))
    write_atomic(folder / "trials.json", json.dumps([asdict(trial) for trial in ranked], indent=2) + "\n")
    trial_curves([(_label(trial), trial.points) for trial in ranked], folder / "trials.png", config.run.name)
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
    seeds: int


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
        first = max(config.eval.every, 1)
        early = ASHAScheduler(time_attr="step", max_t=config.run.steps + 1, grace_period=first, reduction_factor=2)
    # Ray Tune starts a trial for each; the combinations are ours, so that every search draws the same way. A byte is
    # the least that a trial can reserve: the CPUs are for its run.
    choices = [{"name": name, "settings": settings} for name, settings in named.items()]
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
    return [_trial(name, settings, plan, errors.get(name), config) for name, settings in named.items()]


def _trainable() -> Any:
    """The class that Ray Tune runs in a process of its own; made late, since Ray Tune takes seconds to import."""
    from ray import tune as ray_tune

    class TrialRun(ray_tune.Trainable):  # type: ignore[misc]
        """One combination: its runs one after the other, and each evaluation told to the search."""

        def setup(self, config: dict[str, Any]) -> None:
            plan, trial = Plan(**config["plan"]), config["trial"]
            self.runs = TrialRuns(plan, trial["name"], trial["settings"])

        def step(self) -> dict[str, Any]:
            point = self.runs.next_point()
            if point is None:
                return {"figure": self.runs.figure, "step": self.runs.step, "done": True}
            return {"step": point[0], "figure": point[1]}

        def cleanup(self) -> None:
            self.runs.end()

    return TrialRun


def _told(named: Mapping[str, Any], metric: str, report: Report) -> Any:
    """A line for each evaluation of each trial."""
    from ray.tune import Callback

    class Told(Callback):  # type: ignore[misc]
        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **_: Any) -> None:
            name = trial.config["trial"]["name"]
            if not result.get("done"):
                shown = ", ".join(f"{key} = {value}" for key, value in named[name].items())
                figure = f"{metric.removeprefix('eval/')} {result['figure']:.3f}"
                report(f"{name}  step {result['step']:>4}  {figure}  ({shown})")

    return Told()


class TrialRuns:
    """The runs of one combination, a seed each: processes of `rollcast train`, heard through their metrics.jsonl."""

    def __init__(self, plan: Plan, name: str, settings: Mapping[str, Any]) -> None:
        self.plan = plan
        self.settings = settings
        self.step, self.figure = 0, float("-inf")
        self._left = [name if plan.seeds == 1 else f"{name}-seed{seed}" for seed in range(plan.seeds)]
        self._seed = -1
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

    def _start(self, run: str) -> None:
        self._seed += 1
        self._told_to = -1
        self._folder = Path(self.plan.folder) / run
        if any(row["step"] == self.plan.steps for row in metrics.read(RunDir(self._folder).metrics)):
            return  # Made by an earlier search: only its figures are told.
        seed = [f"--run.seed={load_config(self.plan.base).run.seed + self._seed}"]
        where = ["--run", run, f"--run.dir={self.plan.folder}"]
        words = ["train", self.plan.base, *where, *seed, *_overrides(self.settings)]
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
            raise RuntimeError(f"exit code {code}: {' | '.join(tail)}")

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


def _trial(name: str, settings: dict[str, Any], plan: Plan, error: str | None, config: RunConfig) -> Trial:
    runs = [name] if plan.seeds == 1 else [f"{name}-seed{seed}" for seed in range(plan.seeds)]
    curves = [points_of(Path(plan.folder) / run, plan.metric) for run in runs]
    points = [(row[0][0], sum(p[1] for p in row) / len(row)) for row in zip(*curves, strict=False)]
    rows = [row for run in runs for row in metrics.read(RunDir(Path(plan.folder) / run).metrics)]
    times = [row["time"] for row in rows]
    complete = bool(points) and points[-1][0] == config.run.steps
    state = "done" if complete else "ended early"
    if error is not None and not complete:
        state = f"failed: {error.strip().splitlines()[-1]}"
    values = [value for _, value in points]
    best, last = (max(values), values[-1]) if values else (None, None)
    seconds = max(times) - min(times) if times else 0.0
    return Trial(name, settings, state, best, last, seconds, runs, points)


def _label(trial: Trial) -> str:
    return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in trial.settings.items())


def show(trials: Sequence[Trial], console: Console) -> None:
    """The table, the best trial first."""
    keys = list(trials[0].settings) if trials else []
    rows = table(console, "trial", *keys, "best", "last", "seconds", "state", right=(*keys, "best", "last", "seconds"))
    for trial in trials:
        figures = ("-" if value is None else f"{value:.4f}" for value in (trial.best, trial.last))
        values = (str(value) for value in trial.settings.values())
        rows.add_row(trial.name, *values, *figures, f"{trial.seconds:.0f}", trial.state)
    console.print(rows)
