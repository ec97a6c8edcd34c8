"""`rollcast env list`, `check` and `play` as they are typed: what they print, exit codes, and no tracebacks."""

import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

import bad_envs
from rollcast.cli import main
from rollcast.env_cli import known

HEAVY = ("torch", "ray", "vllm", "transformers", "numpy", "gymnasium")
LOADED = f"""
import sys
from rollcast.cli import main
try:
    main(sys.argv[1:])
finally:
    print("loaded:", [name for name in {HEAVY!r} if name in sys.modules])
"""
FEW = ("--episodes", "3", "--max-turns", "5")


def call(*words: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert isinstance(caught.value.code, int)
    return caught.value.code


def type_in(monkeypatch: pytest.MonkeyPatch, text: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text), encoding="utf-8"))


@pytest.mark.parametrize("verb", ["list", "check", "play"])
def test_help_is_instant_and_has_an_example(verb: str) -> None:
    command = [sys.executable, "-c", LOADED, "env", verb, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0
    assert f"Example: rollcast env {verb}" in done.stdout
    assert "loaded: []" in done.stdout


def test_the_three_verbs_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("env", "-h") == 0
    out = capsys.readouterr().out
    assert all(f"  {verb} " in out for verb in ("list", "check", "play"))


# ---- list


def test_list_tells_the_built_in_environments(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("env", "list") == 0
    out = capsys.readouterr().out
    assert "rollcast/QA-v0" in out and "rollcast/TextArena-v0" in out
    assert "bad/Good-v0" not in out and "CartPole" not in out
    assert "train, validation, test" in out


def test_list_as_json_has_arguments_and_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("env", "list", "--json") == 0
    listed = {one["id"]: one for one in json.loads(capsys.readouterr().out)}
    qa = listed["rollcast/QA-v0"]
    assert qa["arguments"]["split"] == "'train'" and qa["splits"] == ["train", "validation", "test"]
    assert qa["summary"].startswith("Questions on geography") and qa["sizes"] is None
    assert list(listed) == sorted(listed)


def test_list_can_tell_sizes() -> None:
    listed = {one.id: one for one in known(sizes=True)}
    sizes = listed["rollcast/QA-v0"].sizes
    assert sizes is not None and sizes["train"] and sizes["test"] and sizes["train"] > sizes["test"]
    assert listed["rollcast/SkyRLGym-v0"].sizes is None, "it cannot be made without arguments"


PLUGIN = '''"""A package that brings an environment along."""

import gymnasium

from rollcast_envs import TextEnv


class ParrotEnv(TextEnv):
    """Say what is said."""

    size = 1

    def __init__(self, word: str = "polly") -> None:
        super().__init__()
        self.word = word

    def begin(self, index):
        return self.word, {"task_id": self.word, "kind": "parrot", "references": [self.word]}

    def respond(self, answer):
        return "", float(answer == self.word), True, False, {"metrics": {"hit": float(answer == self.word)}}


gymnasium.register("parrots/Parrot-v0", entry_point=ParrotEnv)
'''


@pytest.fixture
def plugin(tmp_path: Path) -> dict[str, str]:
    """The surroundings of a process in which the package `parrots` is installed."""
    (tmp_path / "parrots.py").write_text(PLUGIN)
    info = tmp_path / "parrots-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: parrots\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[rollcast.envs]\nparrots = parrots\n")
    return {"PYTHONPATH": ":".join([str(tmp_path), *filter(None, sys.path)]), "PATH": ""}


def test_an_installed_package_is_listed_checked_and_played(plugin: dict[str, str]) -> None:
    def run(*words: str, answers: str = "") -> str:
        command = [sys.executable, "-m", "rollcast", "env", *words]
        done = subprocess.run(command, input=answers, capture_output=True, text=True, env=plugin, timeout=120)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    listed = {one["id"]: one for one in json.loads(run("list", "--json"))}
    assert listed["parrots/Parrot-v0"]["summary"] == "Say what is said."
    assert listed["parrots/Parrot-v0"]["arguments"] == {"word": "'polly'"}
    assert "errors 0" in run("check", "parrots:parrots/Parrot-v0", *FEW)
    assert "reward 1" in run("play", "parrots/Parrot-v0", "--kwargs.word", "hello", answers="hello\n")


# ---- check


def test_a_good_environment_leaves_exit_code_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("env", "check", "bad/Good-v0", *FEW) == 0
    assert capsys.readouterr().out.strip() == ("bad/Good-v0: 3 episodes, 9 turns, reward 0 to 3; errors 0, warnings 0")


def test_warnings_leave_exit_code_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("env", "check", "bad/GoesOn-v0", *FEW) == 0
    out = capsys.readouterr().out
    assert "warning steps after the end" in out and "errors 0, warnings 1" in out


def test_errors_are_told_and_give_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("env", "check", "bad/Raises-v0", *FEW) == 1
    out = capsys.readouterr().out
    assert "error raises" in out
    assert all(f"  {label} " in out for label in ("what", "why", "do this"))


def test_a_report_as_json_is_alone_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("env", "check", "bad/Prints-v0", *FEW, "--json") == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["episodes"] == 3 and report["findings"] == []
    assert "a debugging line" in captured.err


def test_arguments_are_given_as_settings_are(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("rollcast/QA-v0", "--kwargs.split", "test", "--kwargs.kinds=['capital']", "--kwargs.length_cost", "0.5")
    assert call("env", "check", *words, *FEW, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["kwargs"] == {"split": "test", "kinds": ["capital"], "length_cost": 0.5}
    assert min(report["rewards"]) < -1.0


@pytest.mark.parametrize("verb", ["check", "play"])
@pytest.mark.parametrize("env_id", ["rollcast/Nothing-v0", "nowhere_at_all:Nothing-v0", "rollcast/QA-v7"])
def test_an_unknown_environment_gives_exit_code_2(verb: str, env_id: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("env", verb, env_id) == 2
    told = capsys.readouterr().err.splitlines()
    assert told[0] == f"there is no environment '{env_id}'"
    assert "rollcast env list" in "".join(told)
    assert not any("Traceback" in line for line in told)


@pytest.mark.parametrize("words", [("--run.dir", "x"), ("--kwargs.", "1"), ("--kwargs.a", "1", "--kwargs.a.b", "2")])
def test_other_settings_are_refused(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert call("env", "check", "bad/Good-v0", *words) == 2
    assert "Traceback" not in capsys.readouterr().err


# ---- play


def test_answers_of_a_file_are_played(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "answers.txt").write_text("7\nno\n7\n8\n")
    words = ("bad/Good-v0", "--index", "7", "--answers", str(tmp_path / "answers.txt"))
    assert call("env", "play", *words) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert lines[0].startswith("7 (index 7)")
    assert lines[1:8] == [
        "user: Say 7.",
        "answer: 7",
        "reward: 1",
        "user: Again 7.",
        "answer: no",
        "reward: 0",
        "user: Again 7.",
    ]
    assert "terminated  reward 2" in lines and "metrics     turns 3" in lines and "references  7" in lines
    assert any(line.startswith("8 (index 8)") for line in lines), "the next task follows"


def test_reward_parts_are_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    type_in(monkeypatch, b"Yamoussoukro\n")
    assert call("env", "play", "rollcast/QA-v0", "--seed", "3", "--answers", "-") == 0
    out = capsys.readouterr().out
    assert "reward: -0.012 (f1 0, length -0.012)" in out
    assert "metrics     f1 0, exact_match 0" in out
    assert "system: Answer with the name only." in out


def test_a_person_types_until_ctrl_d(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    type_in(monkeypatch, b"yes\nno\n")
    assert call("env", "play", "bad/Good-v0") == 0
    out = capsys.readouterr().out
    assert out.count("reward: 0") == 2 and "answer:" not in out


def test_equal_seeds_open_the_same_episode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "none.txt").write_text("")
    opened = []
    for seed in ("5", "5", "6"):
        assert call("env", "play", "bad/Good-v0", "--seed", seed, "--answers", str(tmp_path / "none.txt")) == 0
        opened.append(capsys.readouterr().out.splitlines()[1])
    assert opened[0] == opened[1] != opened[2]


def test_the_last_task_ends_the_game(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "answers.txt").write_text("a\n" * 9)
    words = ("bad/Good-v0", "--index", str(bad_envs.Good.size - 1), "--answers", str(tmp_path / "answers.txt"))
    assert call("env", "play", *words) == 0
    assert capsys.readouterr().out.count("(index ") == 1


def test_what_would_steer_the_terminal_is_spelt_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    type_in(monkeypatch, b"\x1b[2J\xff\n")
    assert call("env", "play", "bad/Good-v0", "--answers", "-") == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\\x1b[2J" in out


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("bad/Raises-v0", "--answers", "yes.txt"), 1, "the dice fell off the table"),
        (("bad/Good-v0", "--index", "1000", "--answers", "yes.txt"), 1, "expected an integer from 0 to 999"),
        (("bad/Good-v0", "--kwargs.colour", "red"), 1, "unexpected keyword argument 'colour'"),
        (("rollcast/SkyRLGym-v0",), 1, "do this: name a class"),
        (("rollcast/QA-v0", "--kwargs.data", "missing.jsonl"), 1, "missing.jsonl"),
        (("bad/Good-v0", "--answers", "missing.txt"), 2, "missing.txt: cannot be read"),
        (("bad/Good-v0", "--answers", "binary.txt"), 2, "binary.txt: is not text"),
        (("bad/HangsOnLong-v0", "--answers", "long.txt", "--timeout", "0.2"), 1, "did not return within 0.2 s"),
    ],
)
def test_mistakes_are_told_without_a_traceback(
    words: tuple[str, ...],
    code: int,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("yes.txt").write_text("yes\n")
    Path("long.txt").write_text("y" * 6000)
    Path("binary.txt").write_bytes(b"\xff\xfe\x00")
    assert call("env", "play", *words) == code
    err = capsys.readouterr().err
    assert told in err and "why: " in err and "do this: " in err and "Traceback" not in err


def test_a_hang_does_not_keep_the_command(tmp_path: Path) -> None:
    """In a process of its own: the hung thread must not be waited for at the end."""
    (tmp_path / "sleepy.py").write_text(SLEEPY)
    command = [sys.executable, "-m", "rollcast", "env", "check", "sleepy:Sleepy-v0", "--timeout", "0.5", *FEW]
    surroundings = {"PYTHONPATH": ":".join([str(tmp_path), *filter(None, sys.path)]), "PATH": ""}
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, env=surroundings, timeout=120, check=False)
    assert done.returncode == 1
    assert "error hangs" in done.stdout and "Traceback" not in done.stderr
    assert time.monotonic() - started < 100


SLEEPY = """
import time
import gymnasium
from rollcast_envs import TextEnv


class Sleepy(TextEnv):
    def begin(self, index):
        time.sleep(200)

    def respond(self, answer):
        return "", 0.0, True, False, {}


gymnasium.register("Sleepy-v0", entry_point=Sleepy)
"""
