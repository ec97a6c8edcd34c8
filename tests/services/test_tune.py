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
from rollcast.folds import Member, members_of, outcome, refuse_uncut
from rollcast.metrics import MetricsWriter
from rollcast.plot import TrialCurve, trial_curves
from rollcast.rundir import RunDir
from rollcast.tune import Plan, Trial, TrialRuns, _combinations, _metric, _rank, _trial, show, tune

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
        ("[tune]\nfolds = -1\n", "tune.folds"),
        ('[tune]\nfolds = 3\n[tune.space]\neval.split = ["train"]\n', "tune.space"),
        ('[tune]\nfolds = 3\n[tune.space]\n"env.0.kwargs.split" = ["train"]\n', "tune.space"),
        ('[env.kwargs]\nsplit = "test"\n[tune]\nfolds = 3\n', "env.0.kwargs.split"),
        ('[tune]\nfolds = 3\n[eval]\npatience = 2\nbest_metric = "QA-v0/f1"\n', "eval.patience"),
    ],
)
def test_a_search_that_cannot_be_is_refused(text: str, path: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(tmp_path, text)
    assert path in caught.value.what


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


def test_a_combination_is_a_run_for_each_fold_and_seed(tmp_path: Path) -> None:
    config = config_of(tmp_path, "", "--tune.folds=2", "--tune.seeds=2", "--run.seed=7", "--env.1.id=rollcast/Code-v0")
    members = members_of("trial003", config)
    names = ["fold1of2-seed0", "fold1of2-seed1", "fold2of2-seed0", "fold2of2-seed1"]
    assert [member.run for member in members] == [f"trial003-{name}" for name in names]
    assert [member.part for member in members] == [0, 0, 1, 1]
    (tmp_path / "base.toml").write_text(config.to_toml(), encoding="utf-8")
    run = load_config(tmp_path / "base.toml", members[-1].overrides)
    assert (run.run.seed, run.eval.split) == (8, "fold-2/2")
    assert [env.kwargs for env in run.env] == [{"split": "train-2/2"}] * 2


@pytest.mark.parametrize("words", [(), ("--tune.folds=0",), ("--tune.folds=1",)])
def test_without_folds_a_combination_is_one_run_and_splits_are_as_they_were(
    tmp_path: Path, words: tuple[str, ...]
) -> None:
    assert members_of("trial000", config_of(tmp_path, "", *words)) == [Member("trial000", 0, ("--run.seed=0",))]
    seeds = members_of("trial000", config_of(tmp_path, "", *words, "--tune.seeds=2"))
    assert [(member.run, member.part) for member in seeds] == [("trial000-seed0", 0), ("trial000-seed1", 1)]


def test_what_cannot_be_cut_into_folds_is_refused_before_anything_starts(tmp_path: Path) -> None:
    space = "[tune.space]\nlearner.epochs = [1, 2]\n"
    folds = config_of(tmp_path, space, "--tune.folds=3", "--env.0.id=bad_envs:bad/Good-v0")
    with pytest.raises(ConfigError, match=r"Good-v0 cannot be cut into folds") as caught:
        tune(folds, tmp_path / "search", print)
    assert "set tune.folds to 0" in caught.value.fix.lower() and not list((tmp_path / "search").glob("trial*"))
    few = tmp_path / "few.jsonl"
    few.write_text('{"question": "a", "references": "b", "split": "train"}\n', encoding="utf-8")
    with pytest.raises(ConfigError, match="rows of 1 groups in train") as caught:
        refuse_uncut([config_of(tmp_path, space, "--tune.folds=3", f"--env.0.kwargs.data={few}")])
    assert "fewer parts" in caught.value.fix
    refuse_uncut([config_of(tmp_path, space, "--tune.folds=3")])
    refuse_uncut([config_of(tmp_path, space, "--env.0.id=bad_envs:bad/Good-v0")])


FOLDS = [Member(f"t-fold{part + 1}of3", part, ()) for part in range(3)]


def test_the_mean_is_over_folds_at_one_evaluation(tmp_path: Path) -> None:
    curves = [[(0, 0.1), (4, 0.5), (8, 0.4)], [(0, 0.2), (4, 0.6), (8, 0.9)], [(0, 0.0), (4, 0.7), (8, 0.2)]]
    found = outcome(FOLDS, curves, 8, failed=False)
    assert found.points == [(0, pytest.approx(0.1)), (4, pytest.approx(0.6)), (8, pytest.approx(0.5))]
    assert found.best == pytest.approx(0.6) and found.each == [0.5, 0.6, 0.7]
    assert found.spread == pytest.approx(0.1), "not the mean of each fold's best step: none could be chosen so"


def test_a_fold_counts_when_it_came_to_its_end_and_a_failed_one_leaves_no_mean() -> None:
    curves = [[(0, 0.1), (4, 0.5)], [(0, 0.2), (4, 0.7)], [(0, 0.9)]]
    ended = outcome(FOLDS, curves, 4, failed=False)
    assert (ended.best, ended.each) == (pytest.approx(0.6), [0.5, 0.7, None])
    failed = outcome(FOLDS, curves, 4, failed=True)
    assert failed.best is None and failed.points == [] and failed.each == [0.5, 0.7, None]
    nothing = outcome(FOLDS, [[], [], []], 4, failed=True)
    assert nothing.best is None and nothing.each == [None] * 3
    sole = outcome(FOLDS[:1], [[(0, 0.1), (2, 0.3)]], None, failed=True)
    assert (sole.best, sole.each, sole.spread) == (0.3, [0.3], None), "a sole run counts as far as it came"


def test_seeds_of_a_fold_are_averaged_before_folds_are() -> None:
    members = [Member("a", 0, ()), Member("b", 0, ()), Member("c", 1, ()), Member("d", 1, ())]
    found = outcome(members, [[(4, 0.0)], [(4, 1.0)], [(4, 0.6)], [(4, 0.8)]], 4, failed=False)
    assert found.each == [0.5, pytest.approx(0.7)] and found.best == pytest.approx(0.6)
    half = outcome(members, [[(4, 0.0)], [(4, 1.0)], [(4, 0.6)], []], 4, failed=False)
    assert half.each == [0.5, None]


def played(folder: Path, run: str, *figures: float) -> None:
    """What a run leaves that was measured at the steps 0, 1, ..."""
    (folder / run).mkdir(parents=True)
    writer = MetricsWriter(RunDir(folder / run).metrics, None)
    for step, figure in enumerate(figures):
        writer.write(step, {"eval/QA-v0/f1": figure})


def plan_for(folder: Path, steps: int) -> Plan:
    return Plan(str(folder / "base.toml"), str(folder), str(folder), "eval/QA-v0/f1", "local", steps, "fold")


def test_folds_that_are_complete_are_told_and_not_run_again(tmp_path: Path) -> None:
    for member, last in zip(FOLDS, (0.5, 0.7, 0.9), strict=True):
        played(tmp_path, member.run, 0.1, last)
    runs = TrialRuns(plan_for(tmp_path, 1), FOLDS, {})
    heard = []
    while (point := runs.next_point()) is not None:
        heard.append((runs.run, point, runs.judged()))
    assert [(run, point) for run, point, _ in heard[:2]] == [(FOLDS[0].run, (0, 0.1)), (FOLDS[0].run, (1, 0.5))]
    assert len(heard) == 6 and heard[-1][2] == {"folds": 3, "figure": pytest.approx(0.7)}
    found = _trial("t", {"learner.epochs": 1}, FOLDS, plan_for(tmp_path, 1), None)
    assert (found.state, found.best, found.each) == ("done", pytest.approx(0.7), [0.5, 0.7, 0.9])
    assert found.spread == pytest.approx(0.2) and found.parts == "fold"


def test_a_failed_fold_is_named_and_stands_below_the_others(tmp_path: Path) -> None:
    played(tmp_path, FOLDS[0].run, 0.1, 0.9)
    error = f"Traceback\nRuntimeError: {FOLDS[1].run}: exit code 3: diverged"
    failed = _trial("t", {}, FOLDS, plan_for(tmp_path, 1), error)
    assert failed.state == f"failed: RuntimeError: {FOLDS[1].run}: exit code 3: diverged"
    assert failed.best is None and failed.each == [0.9, None, None]
    early = _trial("t", {}, FOLDS, plan_for(tmp_path, 1), None)
    assert (early.state, early.best) == ("ended early", 0.9)
    done = Trial("u", {}, "done", 0.4, 0.4, 1.0, [], [(1, 0.4)], [0.3, 0.4, 0.5], 0.1, "fold")
    assert sorted([failed, early, done], key=_rank) == [done, early, failed]


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
    assert any("1e-05" in line and "-" in line and line.rstrip().endswith("failed") for line in lines)
    assert "trial000 failed: exit code 3" in lines
    curves = [TrialCurve(one.name, one.points, one.best, one.spread) for one in trials]
    trial_curves(curves, tmp_path / "trials.png", "search", "QA-v0/f1")
    assert (tmp_path / "trials.png").stat().st_size > 1000


def test_the_table_tells_the_mean_its_spread_and_every_fold() -> None:
    done = Trial("trial001", {"a.b": 1}, "done", 0.6, 0.5, 9.0, [], [(0, 0.1), (4, 0.6)], [0.5, 0.6, 0.7], 0.1, "fold")
    failed = Trial("trial000", {"a.b": 2}, "failed: [why]", None, None, 9.0, [], [], [0.5, None, None], None, "fold")
    out = io.StringIO()
    show([done, failed], Console(file=out, width=140))
    head, *lines = [line for line in out.getvalue().splitlines() if line.strip()]
    assert head.split() == ["trial", "b", "mean", "sd", "each", "fold", "last", "seconds", "state"]
    first, second = (next(line.split() for line in lines if name in line) for name in ("trial001", "trial000"))
    assert first[1:] == ["1", "0.6000", "0.1000", "0.500", "0.600", "0.700", "0.5000", "9", "done"]
    assert second[2:] == ["-", "-", "0.500", "-", "-", "-", "9", "failed"]
    assert lines[-1] == "trial000 failed: [why]"
