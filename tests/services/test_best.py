"""The best policy: kept whole by a named figure, found again by a resumed run, and the reason to stop."""

import json
from pathlib import Path

import pytest

from rollcast import best, metrics
from rollcast.best import BestPolicy
from rollcast.config import EvalSection
from rollcast.errors import RunFailed
from rollcast.rundir import RunDir


@pytest.fixture
def folder(tmp_path: Path) -> RunDir:
    made = RunDir(tmp_path / "run")
    made.create()
    return made


def saving(text: str):
    def save(path: Path) -> None:
        path.mkdir()
        (path / "weights").write_text(text)

    return save


def judged(policy: BestPolicy, step: int, value: float) -> bool:
    return policy.judge(step, step + 100, {"eval/QA-v0/f1": value, "eval/QA-v0/reward": 0.0}, saving(f"step {step}"))


def test_only_a_better_policy_replaces_the_one_that_is_kept(folder: RunDir) -> None:
    policy = BestPolicy(folder, EvalSection(best_metric="QA-v0/f1"), 0)
    assert [judged(policy, step, value) for step, value in enumerate((0.2, 0.1, 0.2, 0.3))] == [
        True,
        False,
        False,
        True,
    ]
    assert (folder.best / "weights").read_text() == "step 3"
    assert best.read(folder) == {"metric": "QA-v0/f1", "value": 0.3, "step": 3, "policy_version": 103}
    assert [path.name for path in folder.weights.iterdir()] == ["best"], "nothing half written is left"


def test_patience_counts_evaluations_without_a_better_one(folder: RunDir) -> None:
    policy = BestPolicy(folder, EvalSection(best_metric="QA-v0/f1", patience=2), 0)
    stopped = []
    for step, value in enumerate((0.2, 0.1, 0.3, 0.3, 0.1)):
        judged(policy, step, value)
        stopped.append(policy.out_of_patience)
    assert stopped == [False, False, False, False, True]


def test_a_resumed_run_goes_on_with_the_best_of_before(folder: RunDir) -> None:
    settings = EvalSection(best_metric="QA-v0/f1", patience=2)
    judged(BestPolicy(folder, settings, 0), 4, 0.5)
    writer = metrics.MetricsWriter(folder.metrics, None)
    for step, row in ((4, {"eval/QA-v0/f1": 0.5}), (5, {}), (8, {"eval/QA-v0/f1": 0.4})):
        writer.write(step, row)
    resumed = BestPolicy(folder, settings, 8)
    assert (resumed.value, resumed.without_better) == (0.5, 1)
    assert not judged(resumed, 12, 0.45) and resumed.out_of_patience


@pytest.mark.parametrize(
    ("settings", "step"),
    [(EvalSection(best_metric="QA-v0/reward"), 8), (EvalSection(best_metric="QA-v0/f1"), 3), (EvalSection(), 8)],
    ids=["another figure", "a step before it", "none asked for"],
)
def test_a_best_policy_that_no_longer_counts_is_removed(folder: RunDir, settings: EvalSection, step: int) -> None:
    judged(BestPolicy(folder, EvalSection(best_metric="QA-v0/f1"), 0), 4, 0.5)
    assert BestPolicy(folder, settings, step).value is None
    assert best.read(folder) is None and not folder.best.exists()


def test_a_figure_that_no_evaluation_has_is_refused_with_those_there_are(folder: RunDir) -> None:
    policy = BestPolicy(folder, EvalSection(best_metric="QA-v0/f2"), 0)
    with pytest.raises(RunFailed, match=r"no figure 'QA-v0/f2'[\s\S]*QA-v0/f1, QA-v0/reward"):
        judged(policy, 0, 0.1)


def test_without_a_metric_nothing_is_kept(folder: RunDir) -> None:
    assert not judged(BestPolicy(folder, EvalSection(), 0), 0, 1.0)
    assert not folder.best.exists()
    assert json.dumps(best.read(folder)) == "null"
