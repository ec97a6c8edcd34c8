"""Feedback as a data set: what each kind says of an answer, and that a run learns from the file."""

import json
from pathlib import Path
from typing import Any

import pytest

from judged_answers import fill, served
from rollcast import metrics
from rollcast.cli import main
from rollcast.config import FeedbackSection
from rollcast.config_file import load_config
from rollcast.errors import UsageError
from rollcast.feedback_data import export_feedback, judged_questions, live_rating
from rollcast.live.feedback_store import FeedbackStore, Kept
from rollcast.live.feedback_tables import open_to_write, sqlite_url
from rollcast.rundir import RunDir
from rollcast.train import train

SCRIPTED = Path(__file__).resolve().parents[2] / "deploy" / "configs" / "scripted.toml"


def kept(name: str, text: str, **said: Any) -> Kept:
    prompt = said.pop("prompt", None)
    return Kept(served(name, text, prompt=prompt), **said)


def values(*answers: Kept) -> dict[str, float]:
    (row,) = judged_questions(answers, {})
    return {one["answer"]: one["value"] for one in row["judged"]}


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([kept("a", "Lima", thumb="up"), kept("b", "Cusco", thumb="down")], {"Lima": 1.0, "Cusco": -1.0}),
        ([kept("a", "Lima", score=0.75)], {"Lima": 0.5}),
        ([kept("a", "Lima", thumb="down", score=0.75)], {"Lima": 0.5}),
        ([kept("a", "Lima!", edit="Lima")], {"Lima": 1.0, "Lima!": -1.0}),
        ([kept("a", "Lima!", edit="Lima", thumb="up")], {"Lima": 1.0, "Lima!": 1.0}),
        ([kept("a", "Lima", preferred_to=("b",)), kept("b", "Cusco")], {"Lima": 1.0, "Cusco": -1.0}),
        ([kept("a", "Lima", preferred_to=("b",)), kept("b", "Peru", score=0.6)], {"Lima": 1.0, "Peru": 0.2}),
        ([kept("a", "Lima", thumb="up"), kept("b", "Lima", thumb="down"), kept("c", "L", thumb="up")],
         {"L": 1.0, "Lima": 0.0}),
        ([kept("a", "Lima", preferred_to=("gone",))], None),
    ],
)  # fmt: skip
def test_what_each_kind_of_feedback_says(answers: list[Kept], expected: dict[str, float] | None) -> None:
    if expected is None:
        assert list(judged_questions(answers, {})) == []
    else:
        assert values(*answers) == expected


def test_a_row_opens_the_conversation_again() -> None:
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Capital "}, {"type": "text", "text": "of Peru?"}]},
        {"role": "assistant", "content": "Lima"},
        {"role": "user", "content": "And of Chile?"},
    ]
    left_out: dict[str, int] = {}
    answers = [
        kept("a", "Santiago", thumb="up", prompt=talk),
        kept("b", "x", thumb="up", prompt="A text to complete"),
        kept("c", "x", thumb="up", prompt=talk[1:3]),
        kept("d", "Cusco", thumb="down"),
    ]
    (row,) = judged_questions(answers, left_out)
    assert (row["question"], row["system"]) == ("And of Chile?", "Be brief.")
    assert row["history"] == [["Capital of Peru?", "Lima"]] and row["references"] == ["Santiago"]
    assert row["versions"] == [3] and row["time"] == 1e9
    assert left_out == {"not a conversation": 2, "no answer was liked": 1}


def test_the_live_metric_is_of_what_was_rated() -> None:
    assert live_rating([]) == (0.0, 0)
    answers = [kept("a", "x", thumb="up"), kept("b", "x", thumb="down", score=0.5), kept("c", "x", edit="y")]
    assert live_rating(answers) == (0.75, 2)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_bf16: str) -> RunDir:
    """A run that was served and got feedback."""
    monkeypatch.chdir(tmp_path)
    folder = RunDir(tmp_path / "runs" / "served")
    folder.create()
    folder.run_json.write_text("{}", encoding="utf-8")
    config = load_config(SCRIPTED, [f"--model.path={tiny_bf16}", "--run.name=served"])
    folder.config.write_text(config.to_toml(), encoding="utf-8")
    fill(folder)
    return folder


def test_the_verb_writes_questions_or_exact_answers(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    main_ok("feedback", "export", "served", "feedback.jsonl")
    assert "12 questions with 24 judged answers" in capsys.readouterr().out
    rows = [json.loads(line) for line in Path("feedback.jsonl").read_text().splitlines()]
    (third,) = [row for row in rows if row["question"] == "What is city number 3?"]
    assert third["references"] == ["City 3"] and third["judged"][1] == {"answer": "I do not know.", "value": -1.0}
    main_ok("feedback", "export", "served", "answers.jsonl", "--tokens", "--json")
    assert json.loads(capsys.readouterr().out)["rows"] == 24
    first = json.loads(Path("answers.jsonl").read_text().splitlines()[0])
    assert first["answer_ids"] == [7, 2] and first["logprobs"] == [-0.5, -0.25] and first["spans"] == [[3, 0, 2]]


def main_ok(*words: str) -> None:
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code in (0, None)


def test_a_run_without_feedback_says_so(run: RunDir) -> None:
    config = load_config(run.config)
    elsewhere = RunDir(run.path.with_name("other"))
    elsewhere.create()
    FeedbackStore(open_to_write(sqlite_url(elsewhere.feedback)), 0, 0).close()
    with pytest.raises(UsageError, match="Nobody has said anything yet"):
        export_feedback(elsewhere, config, Path("x.jsonl"))
    with pytest.raises(UsageError, match="cannot be written"):
        export_feedback(run, config, Path("none") / "x.jsonl")


def test_retention_settings_have_bounds() -> None:
    assert FeedbackSection().keep_days == 90
    with pytest.raises(ValueError):
        FeedbackSection(max_mib=-1)


@pytest.mark.ray
def test_a_run_trains_on_exported_feedback(run: RunDir, tiny_bf16: str, ray_cluster: str) -> None:
    """The tiny model plays the judged questions with the torch engine; every part of the reward comes from verdicts."""
    file = run.path.parent / "feedback.jsonl"
    written = export_feedback(run, load_config(run.config), file)
    assert written.rows == 12
    words = [
        f"--model.path={tiny_bf16}", "--run.name=taught", "--run.steps=2", "--rollout.engine=torch",
        "--rollout.max_new_tokens=8", "--env.0.id=rollcast/Feedback-v0", f"--env.0.kwargs.data={file}",
        "--eval.every=0", "--checkpoint.every=2",
    ]  # fmt: skip
    config = load_config(SCRIPTED, words)
    train(config, run.path.with_name("taught"))
    folder = RunDir(run.path.with_name("taught"))
    rows = metrics.read(folder.metrics)
    assert rows[-1]["step"] == 2 and rows[-1]["reward/std"] > 0
    played = [json.loads(line) for path in sorted(folder.rollouts.iterdir()) for line in path.read_text().splitlines()]
    assert len(played) == 16 and all(set(one["parts"]) == {"feedback", "length"} for one in played)
    assert all(one["turns"][0]["observation"].startswith("What is city number") for one in played)
    assert any(one["reward"] != 0 for one in played), "the reward tells answers apart"
