"""A search before it starts: what it would try, and what it refuses; and how its trials are told."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rollcast.config import RunConfig
from rollcast.config_file import load_config
from rollcast.errors import ConfigError, UsageError
from rollcast.plot import trial_curves
from rollcast.tune import Trial, _combinations, _metric, show, tune

START = '[run]\nsteps = 1\n\n[model]\npath = "tiny"\n\n[[env]]\nid = "rollcast/QA-v0"\n\n'


def config_of(folder: Path, text: str, *words: str) -> RunConfig:
    path = folder / "search.toml"
    path.write_text(START + text, encoding="utf-8")
    return load_config(path, words)


def test_a_grid_is_every_combination_and_keys_need_no_quotes(tmp_path: Path) -> None:
    config = config_of(tmp_path, '[tune.space]\nlearner.clip_high = [0.2, 0.3]\n"rollout.group_size" = [4, 8, 16]\n')
    found = list(_combinations(config))
    assert len(found) == 6 and found[0] == {"learner.clip_high": 0.2, "rollout.group_size": 4}
    assert len({json.dumps(one) for one in found}) == 6
    typed = config_of(tmp_path, "", "--tune.space.learner.clip_high", "[0.2, 0.3]")
    assert [one["learner.clip_high"] for one in _combinations(typed)] == [0.2, 0.3]
    again = tmp_path / "again.toml"
    again.write_text(config.to_toml(), encoding="utf-8")
    assert load_config(again) == config


def test_what_is_drawn_lies_within_its_bounds_and_is_the_same_again(tmp_path: Path) -> None:
    text = (
        '[tune]\nsearch = "random"\ntrials = 200\n[tune.space]\n'
        "learner.learning_rate = { low = 1e-6, high = 1e-4, log = true }\n"
        "rollout.group_size = { low = 2, high = 9 }\nkl.kind = ['k1', 'k3']\n"
    )
    found = list(_combinations(config_of(tmp_path, text)))
    rates = [one["learner.learning_rate"] for one in found]
    assert len(found) == 200 and all(1e-6 <= rate <= 1e-4 for rate in rates)
    assert 0.35 < sum(rate < 1e-5 for rate in rates) / 200 < 0.65, "each order of magnitude as often"
    assert {one["rollout.group_size"] for one in found} == set(range(2, 10))
    assert {one["kl.kind"] for one in found} == {"k1", "k3"}
    assert found == list(_combinations(config_of(tmp_path, text)))
    assert found != list(_combinations(config_of(tmp_path, text, "--run.seed=1")))


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("[tune.space]\nlearner.clip_high = { low = 0.1, high = 0.2 }\n", "tune.search"),
        ('[tune]\nsearch = "random"\n[tune.space]\nlearner.clip_high = { low = 0.3, high = 0.2 }\n', "tune.space"),
        ('[tune]\nsearch = "random"\n[tune.space]\nkl.coef = { low = 0.0, high = 0.2, log = true }\n', "tune.space"),
        ("[tune.space]\nlearner.clip_high = 0.2\n", "tune.space"),
        ('[tune]\nsearch = "asha"\nseeds = 2\n', "tune.seeds"),
        ('[tune]\nmetric = "Chess-v0/f1"\n', "tune.metric"),
    ],
)
def test_a_search_that_cannot_be_is_refused(text: str, path: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(tmp_path, text)
    assert f"{path} is refused" in caught.value.what


def test_a_search_needs_a_space_and_evaluations(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to search"):
        _metric(config_of(tmp_path, ""))
    with pytest.raises(UsageError, match="needs evaluations"):
        _metric(config_of(tmp_path, "[tune.space]\nlearner.epochs = [1, 2]\n", "--eval.every=0"))
    space = "[tune.space]\nlearner.epochs = [1, 2]\n"
    assert _metric(config_of(tmp_path, space)) == "eval/QA-v0/reward"
    assert _metric(config_of(tmp_path, space, "--eval.best_metric=QA-v0/f1")) == "eval/QA-v0/f1"
    assert _metric(config_of(tmp_path, space, "--tune.metric=QA-v0/exact_match")) == "eval/QA-v0/exact_match"


def test_a_combination_that_no_run_would_take_is_told_before_the_first_starts(tmp_path: Path) -> None:
    config = config_of(
        tmp_path, '[tune.space]\nlearner.critic = ["head", "none"]\n', "--learner.algorithm=actor_critic"
    )
    with pytest.raises(ConfigError, match=r"learner\.critic is refused"):
        tune(config, tmp_path / "search", print)
    assert not list((tmp_path / "search").glob("trial*"))


def trial(name: str, rate: float, *points: tuple[int, float], state: str = "done") -> Trial:
    values: list[Any] = [value for _, value in points]
    best, last = (max(values), values[-1]) if values else (None, None)
    return Trial(name, {"learner.learning_rate": rate}, state, best, last, 12.0, [name], list(points))


def test_the_table_and_the_plot_tell_every_trial(tmp_path: Path) -> None:
    trials = [trial("trial001", 3e-5, (0, 0.1), (4, 0.5)), trial("trial000", 1e-5, state="failed: exit code 3")]
    out = io.StringIO()
    show(trials, Console(file=out, width=120))
    lines = out.getvalue().splitlines()
    assert any("3e-05" in line and "0.5000" in line and "done" in line for line in lines)
    assert any("1e-05" in line and "-" in line and "failed: exit code 3" in line for line in lines)
    trial_curves([(one.name, one.points) for one in trials], tmp_path / "trials.png", "search")
    assert (tmp_path / "trials.png").stat().st_size > 1000
