"""A search as a person runs it: real runs under real Ray Tune, a table, and going on where it was cut off."""

import json
from pathlib import Path
from typing import Any

import pytest

from rollcast import metrics
from rollcast.config import RunConfig
from rollcast.config_file import load_config
from rollcast.rundir import RunDir
from rollcast.tune import tune

SCRIPTED = Path(__file__).resolve().parents[2] / "deploy" / "configs" / "scripted.toml"
pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


def config_for(folder: Path, model: str, *words: str) -> RunConfig:
    common = (f"--model.path={model}", f"--run.dir={folder}", "--run.name=search", "--run.steps=2", "--eval.samples=2")
    return load_config(SCRIPTED, [*common, "--eval.every=1", *words])


def test_a_grid_runs_every_combination_once(tmp_path: Path, tiny_bf16: str, ray_cluster: str) -> None:
    words = ("--tune.space.learner.learning_rate=[1e-5, 1e-3]", "--tune.metric=QA-v0/f1")
    told: list[str] = []
    folder = tmp_path / "search"
    found = tune(config_for(tmp_path, tiny_bf16, *words), folder, told.append)
    assert {trial.name: trial.settings["learner.learning_rate"] for trial in found} == {
        "trial000": 1e-5,
        "trial001": 1e-3,
    }
    for trial in found:
        assert trial.state == "done" and [step for step, _ in trial.points] == [0, 1, 2]
        run = RunDir(folder / trial.name)
        assert load_config(run.config).learner.learning_rate == trial.settings["learner.learning_rate"]
        assert trial.best == max(row["eval/QA-v0/f1"] for row in metrics.read(run.metrics))
    assert found[0].best >= found[1].best  # type: ignore[operator]
    assert len(told) == 1 + 2 * 3 and (folder / "trials.png").stat().st_size > 1000
    written: list[dict[str, Any]] = json.loads((folder / "trials.json").read_text())
    assert [row["name"] for row in written] == [trial.name for trial in found]

    started = {trial.name: RunDir(folder / trial.name).metrics.stat().st_mtime_ns for trial in found}
    again = tune(config_for(tmp_path, tiny_bf16, *words), folder, told.append)
    assert [(t.name, t.best, t.points) for t in again] == [(t.name, t.best, t.points) for t in found]
    assert {name: RunDir(folder / name).metrics.stat().st_mtime_ns for name in started} == started, "not run again"


def test_asha_ends_trials_early_and_the_others_finish(tmp_path: Path, tiny_bf16: str, ray_cluster: str) -> None:
    words = ("--tune.search=asha", "--tune.trials=3", "--run.steps=6", "--tune.metric=QA-v0/f1")
    space = "--tune.space.learner.learning_rate={ low = 1e-6, high = 1e-2, log = true }"
    found = tune(config_for(tmp_path, tiny_bf16, *words, space), tmp_path / "search", print)
    states = [trial.state for trial in found]
    assert set(states) <= {"done", "ended early"} and "done" in states
    for trial in found:
        steps = [row["step"] for row in metrics.read(RunDir(tmp_path / "search" / trial.name).metrics)]
        assert (max(steps) == 6) == (trial.state == "done")


def test_a_failing_trial_is_told_and_the_others_go_on(tmp_path: Path, tiny_bf16: str, ray_cluster: str) -> None:
    words = ("--tune.space.rollout.max_model_len=[40, 512]", "--rollout.max_new_tokens=8", "--tune.metric=QA-v0/f1")
    found = tune(config_for(tmp_path, tiny_bf16, *words), tmp_path / "search", print)
    assert found[0].state == "done"
    assert found[1].state.startswith("failed") and found[1].settings == {"rollout.max_model_len": 40}
