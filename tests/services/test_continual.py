"""Continual learning: when a round begins, what the gate says, and what a promotion leaves behind."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from judged_answers import fill
from rollcast import best, metrics
from rollcast.config_file import load_config
from rollcast.continual import Live, Schedule, due, judged, prepare, promote, round_folder, train_from
from rollcast.errors import ConfigError, UsageError
from rollcast.export import newest_published, read_published
from rollcast.rundir import RunDir
from rollcast.train import train

SCRIPTED = Path(__file__).resolve().parents[2] / "deploy" / "configs" / "scripted.toml"
QUIET = Live(0.9, 100)
LETTERS = """
def letters(answer, references):
    return sum("a" <= character <= "z" for character in answer) / max(1, len(answer))
"""


@pytest.mark.parametrize(
    ("schedule", "now", "began", "live", "begins"),
    [
        (Schedule(3600, None), 0, None, QUIET, "it is the first"),
        (Schedule(3600, None), 3599, 0, QUIET, None),
        (Schedule(3600, None), 3600, 0, QUIET, "the last one began 3600 s ago"),
        (Schedule(None, 0.5), 1e9, 0, QUIET, None),
        (Schedule(None, 0.5), 1, 0, Live(0.49, 20), "the live rating fell to 0.490 (20 ratings)"),
        (Schedule(None, 0.5), 1, 0, Live(0.49, 19), None),
        (Schedule(None, 0.5), 1, 0, Live(0.5, 100), None),
        (Schedule(None, 0.5), 1, 0, Live(0.0, 0), None),
        (Schedule(3600, 0.5), 1, 0, Live(0.1, 50), "the live rating fell to 0.100 (50 ratings)"),
        (Schedule(3600, 0.5), 3600, 0, QUIET, "the last one began 3600 s ago"),
    ],
)
def test_when_a_round_begins(
    schedule: Schedule, now: float, began: float | None, live: Live, begins: str | None
) -> None:
    assert due(schedule, now, began, live) == begins


def kept(step: int, value: float) -> dict[str, Any]:
    return {"metric": "QA-v0/f1", "value": value, "step": step, "policy_version": step}


ROWS = [{"step": 0, "eval/QA-v0/f1": 0.5}, {"step": 8, "eval/QA-v0/f1": 0.6}]


@pytest.mark.parametrize(
    ("chosen", "rows", "margin", "better"),
    [
        (kept(8, 0.6), ROWS, 0.0, True),
        (kept(8, 0.6), ROWS, 0.05, True),
        (kept(8, 0.6), ROWS, 0.1, False),
        (kept(8, 0.5), ROWS, 0.0, False),
        (kept(0, 0.5), ROWS, 0.0, False),
        (None, ROWS, 0.0, False),
        (kept(8, 0.6), ROWS[1:], 0.0, False),
        (kept(8, 0.6), [{"step": 0}], 0.0, False),
    ],
)
def test_what_passes_the_gate(
    chosen: dict[str, Any] | None, rows: list[dict[str, Any]], margin: float, better: bool
) -> None:
    verdict = judged(chosen, rows, margin)
    assert verdict.better is better and verdict.why
    assert not better or (verdict.before, verdict.after) == (0.5, 0.6)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--run.every=1d"], "promoted by eval.best_metric alone"),
        (["--run.below=0.5", "--eval.best_metric=QA-v0/f1", "--eval.every=0"], "promoted by eval.best_metric alone"),
        (["--run.every=soon"], "run.every cannot be 'soon'"),
    ],
)
def test_a_schedule_needs_a_gate(words: list[str], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        load_config(SCRIPTED, words)


def test_times_are_written_as_people_say_them() -> None:
    for text, seconds in (("90s", 90), ("30m", 1800), ("6h", 21600), ("1d", 86400)):
        config = load_config(SCRIPTED, [f"--run.every={text}", "--eval.best_metric=QA-v0/f1"])
        assert config.run.every_s == seconds


WORDS = (
    "--rollout.engine=torch", "--model.dtype=float32", "--rollout.max_new_tokens=6", "--rollout.group_size=8",
    "--learner.critic=none", "--learner.normalize_advantages=group", "--learner.learning_rate=1e-2",
    "--buffer.max_staleness=0", "--eval.every=3", "--eval.samples=4", "--eval.split=train",
)  # fmt: skip


def settings(folder: Path, model: str, *words: str) -> Any:
    (folder / "letters.py").write_text(LETTERS, encoding="utf-8")
    reward = f"""--env.0.rewards=[{{function = '{folder / "letters.py"}:letters'}}]"""
    where = (f"--model.path={model}", f"--run.dir={folder / 'runs'}")
    return load_config(SCRIPTED, [*where, reward, *WORDS, *words])


@pytest.mark.soak
@pytest.mark.ray
def test_two_rounds_learn_from_feedback_and_the_better_policy_is_promoted(
    tmp_path: Path, tiny_fp32: str, ray_cluster: str
) -> None:
    """The served run stands at version 2; what a round finds better becomes its version 3; the next begins there."""
    served = RunDir(tmp_path / "runs" / "served")
    train(settings(tmp_path, tiny_fp32, "--run.name=served", "--run.steps=2"), served.path)
    before = newest_published(served)
    assert before is not None and before.version == 2 and best.read(served) is None
    fill(served, 6)
    check_what_a_round_begins_with(tmp_path, tiny_fp32, served)
    said: list[str] = []
    words = ("--run.name=round", "--run.steps=3", "--env.0.id=rollcast/Feedback-v0", "--run.rounds=2")
    config = settings(tmp_path, tiny_fp32, *words, "--run.every=1s", "--eval.best_metric=Feedback-v0/reward")
    train_from(config, served, "auto", said.append)

    first, second = (round_folder(config, number) for number in (1, 2))
    verdict = json.loads(first.verdict.read_text())
    assert verdict["better"] and verdict["after"] > verdict["before"] and verdict["version"] == 3, said
    origin = json.loads(first.run_json.read_text())["from"]
    assert (origin["run"], origin["policy_version"]) == ("served", 2)
    assert json.loads(second.run_json.read_text())["from"]["policy_version"] == 3
    assert json.loads(second.run_json.read_text())["from"]["best"]["from"] == "round-1"
    assert [row["policy_version"] for row in metrics.read(second.metrics)] == [0, 1, 2, 3], "a round has its own"
    played = json.loads(next(second.rollouts.iterdir()).read_text().splitlines()[0])
    assert played["turns"][0]["observation"].startswith("What is city number")
    assert json.loads(second.verdict.read_text())["before"] == pytest.approx(verdict["after"]), "the same evaluation"

    now = best.read(served)
    assert now is not None and now["policy_version"] == served.high_water_mark() >= 3
    published = newest_published(served)
    assert published is not None and published.version == served.high_water_mark()
    winner = second if json.loads(second.verdict.read_text())["better"] else first
    assert tensors(served.best).keys() == tensors(winner.best).keys()
    assert all(torch.equal(tensor, tensors(winner.best)[name]) for name, tensor in tensors(served.best).items())
    assert read_published(served.best).version == published.version

    told = len(said)
    train_from(config, served, "auto", said.append)
    assert len(said) == told, "rounds that are over are not played again"


def check_what_a_round_begins_with(tmp_path: Path, tiny_fp32: str, served: RunDir) -> None:
    config = settings(tmp_path, tiny_fp32, "--run.name=next")
    folder = RunDir(tmp_path / "runs" / "next")
    made = prepare(config, served, folder, print)
    assert Path(made.model.path) == folder.base
    old, new = load_file(Path(tiny_fp32) / "model.safetensors"), load_file(folder.base / "model.safetensors")
    assert any(not torch.equal(old[name], new[name]) for name in new), "not the model that the served run began with"
    assert prepare(config, served, folder, print) == made, "and what is there is used again"
    with pytest.raises(UsageError, match="began from another run"):
        prepare(config, RunDir(tmp_path / "runs" / "other"), folder, print)
    with pytest.raises(UsageError, match="has no best policy"):
        promote(served, served)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    from rollcast.export import _published_tensors

    return {name: tensor.clone() for name, tensor in _published_tensors(read_published(folder)).items()}
