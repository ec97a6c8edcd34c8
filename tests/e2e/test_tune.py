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


@pytest.mark.soak
def test_a_trial_is_a_run_like_any_other(tmp_path: Path, tiny_bf16: str, ray_cluster: str) -> None:
    words = ("--tune.space.learner.learning_rate=[1e-4]", "--tune.metric=QA-v0/f1", "--run.steps=1")
    (trial,) = tune(config_for(tmp_path, tiny_bf16, *words), tmp_path / "search", print)
    run = RunDir(tmp_path / "search" / trial.name)
    assert trial.state == "done" and [step for step, _ in trial.points] == [0, 1]
    assert load_config(run.config).learner.learning_rate == 1e-4
    assert trial.best == max(row["eval/QA-v0/f1"] for row in metrics.read(run.metrics))


@pytest.mark.soak
def test_a_grid_runs_every_combination_once_and_a_failing_one_is_told(
    tmp_path: Path, tiny_bf16: str, ray_cluster: str
) -> None:
    words = ("--tune.space.rollout.max_model_len=[40, 512]", "--rollout.max_new_tokens=8", "--tune.metric=QA-v0/f1")
    told: list[str] = []
    folder = tmp_path / "search"
    good, bad = tune(config_for(tmp_path, tiny_bf16, *words), folder, told.append)
    assert bad.state.startswith("failed") and bad.settings == {"rollout.max_model_len": 40} and bad.best is None
    run = RunDir(folder / good.name)
    assert good.state == "done" and [step for step, _ in good.points] == [0, 1, 2]
    assert load_config(run.config).rollout.max_model_len == 512
    assert good.best == max(row["eval/QA-v0/f1"] for row in metrics.read(run.metrics))
    assert len(told) == 1 + 3 and (folder / "trials.png").stat().st_size > 1000
    written: list[dict[str, Any]] = json.loads((folder / "trials.json").read_text())
    assert [row["name"] for row in written] == [good.name, bad.name]

    before = run.metrics.stat().st_mtime_ns
    only_good = "--tune.space.rollout.max_model_len=[512]"
    (folder / good.name).rename(folder / "trial000-good")
    (folder / bad.name).rename(folder / "old")
    (folder / "trial000-good").rename(folder / "trial000")
    (again,) = tune(config_for(tmp_path, tiny_bf16, only_good, *words[1:]), folder, told.append)
    assert (again.best, again.points) == (good.best, good.points)
    assert RunDir(folder / "trial000").metrics.stat().st_mtime_ns == before, "what is complete is not run again"


@pytest.mark.soak
def test_asha_ends_trials_early_and_the_others_finish(tmp_path: Path, tiny_bf16: str, ray_cluster: str) -> None:
    words = ("--tune.search=asha", "--tune.trials=3", "--run.steps=6", "--tune.metric=QA-v0/f1")
    space = "--tune.space.learner.learning_rate={ low = 1e-6, high = 1e-2, log = true }"
    found = tune(config_for(tmp_path, tiny_bf16, *words, space), tmp_path / "search", print)
    states = [trial.state for trial in found]
    assert set(states) <= {"done", "ended early"} and "done" in states
    for trial in found:
        steps = [row["step"] for row in metrics.read(RunDir(tmp_path / "search" / trial.name).metrics)]
        assert (max(steps) == 6) == (trial.state == "done")


@pytest.mark.soak
def test_folds_are_runs_on_parts_of_train_and_a_failing_one_is_named(
    tmp_path: Path, tiny_bf16: str, ray_cluster: str
) -> None:
    words = ("--tune.folds=2", "--tune.metric=QA-v0/f1", "--run.steps=1", "--rollout.max_new_tokens=8")
    told: list[str] = []
    folder = tmp_path / "search"
    space = "--tune.space.rollout.max_model_len=[40, 512]"
    good, bad = tune(config_for(tmp_path, tiny_bf16, *words, space), folder, told.append)
    assert good.runs == ["trial001-fold1of2", "trial001-fold2of2"] and good.state == "done"
    for number, run in enumerate(good.runs, start=1):
        config = load_config(RunDir(folder / run).config)
        assert (config.env[0].kwargs, config.eval.split) == ({"split": f"train-{number}/2"}, f"fold-{number}/2")
        (last,) = [row for row in metrics.read(RunDir(folder / run).metrics) if row["step"] == 1]
        assert [step for step, _ in good.points] == [0, 1] and "eval/QA-v0/f1" in last
    assert good.best == pytest.approx(sum(value or 0.0 for value in good.each) / 2) and good.spread is not None
    assert bad.state.startswith("failed") and "trial000-fold1of2" in bad.state and bad.best is None
    assert not (folder / "trial000-fold2of2").exists(), "after a failed fold no further one is run"
    before = [RunDir(folder / run).metrics.stat().st_mtime_ns for run in good.runs]
    again, _ = tune(config_for(tmp_path, tiny_bf16, *words, space), folder, told.append)
    assert (again.each, again.points) == (good.each, good.points)
    assert [RunDir(folder / run).metrics.stat().st_mtime_ns for run in good.runs] == before


@pytest.mark.soak
def test_asha_ends_combinations_after_complete_folds(tmp_path: Path, tiny_bf16: str, ray_cluster: str) -> None:
    words = ("--tune.search=asha", "--tune.trials=3", "--tune.folds=3", "--run.steps=1", "--tune.metric=QA-v0/f1")
    space = "--tune.space.learner.learning_rate={ low = 1e-6, high = 1e-2, log = true }"
    found = tune(config_for(tmp_path, tiny_bf16, *words, space), tmp_path / "search", print)
    assert {trial.state for trial in found} <= {"done", "ended early"} and found[0].state == "done"
    for trial in found:
        complete = sum(value is not None for value in trial.each)
        assert (complete == 3) == (trial.state == "done") and complete >= 1
