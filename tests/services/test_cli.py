"""The command as it is typed: exit codes, messages, and what it does not load."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rollcast.cli import main, take_overrides
from rollcast.errors import UsageError

HEAVY = ("torch", "ray", "vllm", "transformers", "numpy")
FILE = """
[run]
steps = 3
[model]
path = "some-org/some-model"
[[env]]
id = "rollcast/QA-v0"
[rollout]
engine = "torch"
[learner]
num_learners = 0
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "run.toml").write_text(FILE)
    return "run.toml"


def call(*words: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert isinstance(caught.value.code, int)
    return caught.value.code


def in_fresh_python(code: str, *words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=60, check=False)


LOADED = f"""
import sys
from rollcast.cli import main
try:
    main(sys.argv[1:])
finally:
    print("loaded:", [name for name in {HEAVY!r} if name in sys.modules])
"""


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["demo", "--help"]])
def test_help_loads_nothing_heavy(words: list[str]) -> None:
    done = in_fresh_python(LOADED, *words)
    assert done.returncode == 0
    assert "loaded: []" in done.stdout
    assert "Usage:" in done.stdout
    assert len(words) == 1 or f"Example: rollcast {words[0]}" in done.stdout


def test_a_dry_run_tells_the_plan_and_starts_nothing(file: str, tmp_path: Path) -> None:
    done = in_fresh_python(LOADED, "train", file, "--dry-run", "--run", "first", cwd=tmp_path)
    assert done.returncode == 0
    assert "loaded: []" in done.stdout
    assert "3 steps of 64 samples" in done.stdout
    assert str(tmp_path / "runs" / "first") in done.stdout
    assert not (tmp_path / "runs").exists()


def test_the_module_is_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rollcast", "train", "none.toml"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "none.toml: cannot be read",
        "why: No such file or directory",
        "do this: name a TOML file, such as deploy/configs/demo.toml",
    ]


def test_a_plan_as_json(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", file, "--dry-run", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["samples_per_step"] == 64
    assert plan["processes"][0]["name"] == "trainer"


def test_overrides_stand_anywhere(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--learner.prompts_per_step",
        "2",
        file,
        "--rollout.group_size=4",
        "--dry-run",
        "--run.steps",
        "9",
    ]
    assert call("train", *words) == 0
    assert "9 steps of 8 samples" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--learner.clipp", "0.1"], ["learner.clipp", "learner.clip_low"]),
        (["--rollout.workers", "0"], ["rollout.workers"]),
        (["--buffer.max_staleness", "-1"], ["buffer.max_staleness"]),
        (["--rollout.top_p", "0.9"], ["rollout.top_p", "distribution"]),
        (["--model.path", "/nowhere"], ["model.path", "/nowhere"]),
        (["--run.dir", "run.toml"], ["run.dir", "run.toml"]),
        (["--rollout.gpus_per_worker", "4096"], ["4096 GPUs"]),
        (["--resume", "none"], ["--resume none"]),
        (["--run", "a/b"], ["run.name", "a/b"]),
        (["--json"], ["--dry-run"]),
        (["--learner.epochs"], ["--learner.epochs has no value"]),
        (["--learner.epochs", "--dry-run"], ["--learner.epochs has no value"]),
    ],
)
def test_a_slip_is_told_in_three_lines(
    file: str, words: list[str], expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("train", file, *words) == 2
    captured = capsys.readouterr()
    for text in (*expected, "why: ", "do this: "):
        assert text in captured.err
    assert "Traceback" not in captured.err
    assert "\x1b" not in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("words", [["--foo"], ["--foo=1"], ["--learner", "3"], ["second.toml"], ["-x"]])
def test_an_unknown_option_is_a_usage_error(file: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", file, *words) == 2
    captured = capsys.readouterr()
    assert words[0].split("=")[0] in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize("words", [["train"], ["nope"], [], ["demo", "--seed", "x"], ["demo", "--steps", "0"]])
def test_usage_errors_exit_with_2(words: list[str]) -> None:
    assert call(*words) == 2


def test_ctrl_c_exits_with_130() -> None:
    code = "from rollcast import cli\n@cli.app.command()\ndef hit(): raise KeyboardInterrupt\ncli.main(['hit'])"
    assert in_fresh_python(code).returncode == 130


@pytest.mark.parametrize(("kind", "code"), [("RunFailed", 1), ("RunDiverged", 3), ("UsageError", 2)])
def test_every_error_has_its_exit_code(kind: str, code: int) -> None:
    script = (
        "from rollcast import cli, errors\n@cli.app.command()\n"
        f"def hit(): raise errors.{kind}('[what]', 'why', 'fix')\ncli.main(['hit'])"
    )
    done = in_fresh_python(script)
    assert done.returncode == code
    assert done.stderr == "[what]\nwhy: why\ndo this: fix\n"


def test_a_bug_keeps_its_traceback() -> None:
    code = "from rollcast import cli\n@cli.app.command()\ndef hit(): raise KeyError('bug')\ncli.main(['hit'])"
    done = in_fresh_python(code)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "KeyError: 'bug'" in done.stderr


def test_overrides_part_from_other_words() -> None:
    words = [
        "a.toml",
        "--a.b",
        "-1",
        "--run",
        "x.y",
        "--c.d=e=f",
        "--env.0.kwargs.my-key",
        "v",
        "--",
        "--e.f",
    ]
    overrides, others = take_overrides(words)
    assert overrides == ["--a.b=-1", "--c.d=e=f", "--env.0.kwargs.my-key=v"]
    assert others == ["a.toml", "--run", "x.y", "--", "--e.f"]
    with pytest.raises(UsageError, match=r"--a\.b has no value"):
        take_overrides(["--a.b"])
