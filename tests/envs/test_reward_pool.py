"""Reward functions in real child processes: every way in which one misbehaves, and what the caller gets then."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from rollcast_envs.reward_pool import Function, Outcome, RewardCall, RewardPool, RewardRefused, shared

MODULE = "rewards_of_a_user"
SOURCE = r"""
import asyncio, json, math, os, re, subprocess, sys, time
from pathlib import Path

def good(answer, references, **fields): return float(answer in references)
def question_length(question, answer): return len(question)
def by_position(answer, references, /): return len(references)
def needs_solution(answer, solution): return float(answer == solution)
def with_option(answer, *, factor, **fields): return factor * len(answer)
def raises(answer): raise KeyError("x\ny")
def cannot_say(answer):
    class Silent(Exception):
        def __str__(self): raise RuntimeError
    raise Silent
def exits(answer): raise SystemExit(3)
def interrupts(answer): raise KeyboardInterrupt
def sleeps(answer):
    if answer == "slow": time.sleep(30)
    return 1.0
def backtracks(answer): return float(re.match("(a+)+$", answer) is not None)
def dies(answer):
    if answer == "die": os._exit(7)
    return 1.0
def killed(answer): os.kill(os.getpid(), 9)
def prints(answer):
    print('{"results": [{"value": 99}]}', flush=True)
    os.write(1, b'{"results": [{"value": 98}]}\n')
    sys.__stdout__.write("noise\n")
    return 1.0
def returns(answer):
    import numpy as np
    return {
        "None": None, "str": "1.0", "bytes": b"1", "nan": math.nan, "inf": -math.inf, "list": [1, 2], "dict": {},
        "huge": 10**400, "complex": 1j, "array": np.ones(2), "object": object(), "generator": (x for x in [1.0]),
        "float32": np.float32(0.5), "float64": np.float64(0.5), "int64": np.int64(2), "scalar array": np.array(0.25),
        "bool": True, "numpy bool": np.bool_(False), "int": 3, "numpy nan": np.float32("nan"),
    }[answer]
def listed(answers, references, **columns):
    import numpy as np
    return {
        "short": [], "long": [1.0, 2.0], "number": 1.0, "None": None, "nones": [None], "string": "1",
        "array": np.ones(1), "tuple": (2.0,), "generator": (1.0 for _ in answers), "nan": [math.nan],
    }[answers[0]]
def batch_size(answers, references, questions, **columns):
    time.sleep(0.05)
    assert len(answers) == len(references) == len(questions) == len(columns["n"])
    return [len(answers)] * len(answers)
def one_is_poison(answers):
    time.sleep(0.02)
    if "poison" in answers: raise ValueError("poisoned")
    if "hang" in answers: time.sleep(30)
    return [len(answer) for answer in answers]
def half_a_second(answer):
    time.sleep(0.5)
    return 1.0
async def waits(answer, references):
    await asyncio.sleep(0.2)
    if answer == "raise": raise ValueError("later")
    return len(answer)
async def waits_for_many(answers):
    await asyncio.sleep(0.01)
    return [len(answer) for answer in answers]
def second_time_lucky(answer, file):
    with open(file, "a") as log: log.write("x")
    if len(Path(file).read_text()) < 2: raise ConnectionError("first time")
    return 1.0
def counts_nonsense(answer, file):
    with open(file, "a") as log: log.write("x")
    return None
def starts_another(answer, file):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    Path(file).write_text(str(child.pid))
    time.sleep(30)
def process_id(answer): return os.getpid()
class Callable:
    def __call__(self, answer, references): return 4
instance = Callable()
def no_form(response): return 1.0
not_callable = 7
"""
PATIENT = {"timeout_s": 60.0, "retries": 0}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that a run is started in, with the user's module in it."""
    (tmp_path / f"{MODULE}.py").write_text(SOURCE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def pool() -> Iterator[RewardPool]:
    pool = RewardPool()
    yield pool
    ours = children()
    pool.close()
    assert not [process for process in ours if process.is_running()]
    assert MODULE not in sys.modules


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "reward_child.py" in command(child)]


def command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # It was just killed, and will be replaced.
        return ""


def call(answer: str = "Paris", **fields: Any) -> RewardCall:
    return RewardCall("What is the capital of France?", answer, ["Paris"], fields)


def function(name: str, **options: Any) -> Function:
    return Function(f"{MODULE}:{name}", options)


def ask(pool: RewardPool, name: str, answer: str = "Paris", **fields: Any) -> Outcome:
    pool.prepare(function(name))
    return pool.start(function(name), call(answer, **fields), **PATIENT)()


@pytest.mark.parametrize(
    ("name", "value"),
    [("good", 1.0), ("question_length", 30.0), ("by_position", 1.0), ("instance", 4.0), ("waits", 5.0)],
)
def test_a_function_gets_what_its_parameters_name(pool: RewardPool, name: str, value: float) -> None:
    outcome = ask(pool, name, extra="ignored by most")
    assert outcome.value == value and outcome.error is None and outcome.seconds > 0


def test_fields_and_options_are_keywords(pool: RewardPool) -> None:
    assert ask(pool, "needs_solution", "4", solution="4").value == 1.0
    assert "it needs solution, and there is only answer, references, question" in str(ask(pool, "needs_solution").error)
    assert pool.start(function("with_option", factor=3), call("ab", factor=9), **PATIENT)().value == 6.0


def test_a_file_is_named_by_its_path_and_imports_what_lies_beside_it(pool: RewardPool, home: Path) -> None:
    (home / "deep").mkdir()
    (home / "deep" / "beside.py").write_text("WORTH = 0.5\n")
    (home / "deep" / "checker.py").write_text(
        "from beside import WORTH\nclass Rewards:\n    @staticmethod\n    def check(answer): return WORTH\n"
    )
    assert pool.start(Function("deep/checker.py:Rewards.check"), call(), **PATIENT)().value == 0.5


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        *(("float32", 0.5), ("float64", 0.5), ("int64", 2.0), ("scalar array", 0.25)),
        *(("bool", 1.0), ("numpy bool", 0.0), ("int", 3.0)),
    ],
)
def test_every_kind_of_number_is_a_number(pool: RewardPool, answer: str, value: float) -> None:
    assert ask(pool, "returns", answer).value == value


def test_nonsense_is_an_error_that_says_what_was_returned(pool: RewardPool) -> None:
    said = {
        "None": "returned None; expected a finite number",
        "str": "the str '1.0'",
        "bytes": "the bytes b'1'",
        "nan": "returned nan",
        "inf": "returned -inf",
        "list": "the list [1, 2]",
        "dict": "the dict {}",
        "huge": "returned inf",
        "complex": "the complex 1j",
        "array": "a ndarray",
        "object": "a object",
        "generator": "a generator",
        "numpy nan": "returned nan",
    }
    for answer, words in said.items():
        outcome = ask(pool, "returns", answer)
        assert outcome.value is None and words in str(outcome.error), (answer, outcome)
    assert ask(pool, "returns", "int").value == 3.0


def test_a_batch_must_have_one_number_for_each_answer(pool: RewardPool) -> None:
    said = {
        "short": "returned a list of 0 for 1 answers; expected a list of as many numbers",
        "long": "a list of 2 for 1 answers",
        "number": "the float 1.0 for 1 answers",
        "None": "returned None for 1 answers",
        "nones": "returned None; expected",
        "string": "the str '1'",
        "generator": "a generator",
        "nan": "returned nan",
    }
    for answer, words in said.items():
        assert words in str(ask(pool, "listed", answer).error), answer
    assert (ask(pool, "listed", "array").value, ask(pool, "listed", "tuple").value) == (1.0, 2.0)


@pytest.mark.parametrize(
    ("name", "answer", "words"),
    [
        ("raises", "", rf"raised KeyError: 'x\ny' ({MODULE}.py:"),
        ("cannot_say", "", "raised Silent ("),
        ("exits", "", "raised SystemExit: 3"),
        ("interrupts", "", "raised KeyboardInterrupt"),
        ("dies", "die", "ended its process with exit code 7"),
        ("killed", "", "died of SIGKILL"),
        ("waits", "raise", "raised ValueError: later"),
    ],
)
def test_what_a_function_does_to_itself_is_told(pool: RewardPool, name: str, answer: str, words: str) -> None:
    outcome = ask(pool, name, answer)
    assert outcome.value is None and words in str(outcome.error) and not outcome.timed_out


@pytest.mark.parametrize(("name", "answer"), [("sleeps", "slow"), ("backtracks", "a" * 40 + "!")])
def test_a_function_that_hangs_is_killed_and_the_next_call_works(pool: RewardPool, name: str, answer: str) -> None:
    pool.prepare(function(name))
    began = time.monotonic()
    outcome = pool.start(function(name), call(answer), timeout_s=0.5)()
    assert time.monotonic() - began < 10
    assert outcome.timed_out and outcome.error == "did not return within 0.5 s"
    assert ask(pool, name, "aaa").value == 1.0


def test_the_next_call_works_after_a_child_died(pool: RewardPool) -> None:
    assert ask(pool, "dies", "die").value is None
    assert ask(pool, "dies", "live").value == 1.0


def test_what_a_function_prints_reaches_no_caller(pool: RewardPool, capfd: pytest.CaptureFixture[str]) -> None:
    assert [ask(pool, "prints").value for _ in range(3)] == [1.0] * 3
    out, err = capfd.readouterr()
    assert out == "" and "noise" in err


def test_children_work_side_by_side(pool: RewardPool) -> None:
    pool.prepare(function("half_a_second"))
    pool.start(function("half_a_second"), call(), **PATIENT)
    pool.start(function("half_a_second"), call(), **PATIENT)()  # By now both children are up.
    began = time.monotonic()
    waiting = [pool.start(function("half_a_second"), call(), **PATIENT) for _ in range(6)]
    assert [wait().value for wait in waiting] == [1.0] * 6
    assert 1.4 < time.monotonic() - began < 2.9  # One after the other it would be 3 s.
    assert len(children()) == 2


def test_the_second_child_comes_only_when_it_is_needed(pool: RewardPool) -> None:
    pool.prepare(function("process_id"))
    assert len({ask(pool, "process_id").value for _ in range(20)}) == 1
    assert len(children()) == 1


def test_a_batch_function_gets_what_waits(pool: RewardPool) -> None:
    pool.prepare(function("batch_size"))
    waiting = [pool.start(function("batch_size"), call(str(n), n=n), **PATIENT) for n in range(80)]
    sizes = [wait().value for wait in waiting]
    assert None not in sizes and max(size for size in sizes if size) == 32.0


def test_an_async_function_waits_for_many_at_once(pool: RewardPool) -> None:
    pool.prepare(function("waits"))
    began = time.monotonic()
    waiting = [pool.start(function("waits"), call("x" * n), **PATIENT) for n in range(40)]
    assert [wait().value for wait in waiting] == list(range(40))
    assert time.monotonic() - began < 6  # One by one it would be 8 s.
    assert ask(pool, "waits_for_many", "four").value == 4.0


@pytest.mark.parametrize("bad", ["poison", "hang"])
def test_one_bad_answer_does_not_cost_the_others_of_its_batch(pool: RewardPool, bad: str) -> None:
    one = Function(f"{MODULE}:one_is_poison", processes=1)
    pool.prepare(one)
    answers = ["first", *("good" * n for n in range(1, 6)), bad, "last"]
    outcomes = [wait() for wait in [pool.start(one, call(a), timeout_s=2, retries=2) for a in answers]]
    assert [o.value for a, o in zip(answers, outcomes, strict=True) if a != bad] == [
        float(len(a)) for a in answers if a != bad
    ]
    assert outcomes[6].value is None and outcomes[6].timed_out == (bad == "hang")


def test_what_was_raised_is_tried_again_and_nonsense_is_not(pool: RewardPool, home: Path) -> None:
    log = str(home / "log")
    outcome = pool.start(function("second_time_lucky"), call(file=log), timeout_s=60, retries=1)()
    assert (outcome.value, outcome.retries) == (1.0, 1)
    nonsense = str(home / "nonsense")
    outcome = pool.start(function("counts_nonsense"), call(file=nonsense), timeout_s=60, retries=3)()
    assert (outcome.value, outcome.retries, Path(nonsense).read_text()) == (None, 0, "x")


def test_hanging_and_dying_calls_are_tried_again_too(pool: RewardPool) -> None:
    for name, answer in (("sleeps", "slow"), ("dies", "die")):
        pool.prepare(function(name))
        outcome = pool.start(function(name), call(answer), timeout_s=1, retries=1)()
        assert outcome.value is None and outcome.retries == 1


def test_a_call_never_waits_longer_than_its_tries_may_take(pool: RewardPool) -> None:
    one = Function(f"{MODULE}:sleeps", processes=1)
    pool.prepare(one)
    began = time.monotonic()
    outcomes = [wait() for wait in [pool.start(one, call("slow"), timeout_s=0.3, retries=1) for _ in range(10)]]
    assert time.monotonic() - began < 5  # Each of the ten alone would take 0.6 s.
    assert all(outcome.timed_out for outcome in outcomes)
    assert "give it more processes, or a longer timeout_s" in str(outcomes[-1].error)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (f"{MODULE}:missing", "has no attribute 'missing'"),
        (f"{MODULE}:no_form", "its parameters are (response); one of them must be called answer"),
        (f"{MODULE}:not_callable", "no function but the int 7"),
        ("broken:f", "raised ZeroDivisionError: division by zero (broken.py:1)"),
        ("syntax:f", "raised SyntaxError"),
        ("leaves:f", "raised SystemExit: 0"),
        ("dead:f", "ended its process with exit code 5 while it was loaded"),
        ("slow:f", "was not loaded within 1 s"),
        ("missing.py:f", "No such file"),
    ],
)
def test_a_function_that_cannot_be_loaded_is_refused_before_the_first_call(home: Path, path: str, words: str) -> None:
    for name, source in {
        "broken": "1 / 0",
        "syntax": "def",
        "leaves": "import sys; sys.exit(0)",
        "dead": "import os; os._exit(5)",
        "slow": "import time; time.sleep(30)",
    }.items():
        (home / f"{name}.py").write_text(source)
    pool = RewardPool(start_s=1.0 if path == "slow:f" else 30.0)
    with pytest.raises(RewardRefused) as refused:
        pool.prepare(Function(path))
    assert words in str(refused.value)
    assert not children()
    pool.close()


def test_a_function_that_broke_between_two_children_fails_its_calls(pool: RewardPool, home: Path) -> None:
    (home / "changing.py").write_text("import os\ndef f(answer): os._exit(1)\n")
    pool.prepare(Function("changing:f"))
    (home / "changing.py").write_text("raise RuntimeError('changed')\n")
    assert "exit code 1" in str(pool.start(Function("changing:f"), call(), **PATIENT)().error)
    assert "raised RuntimeError: changed" in str(pool.start(Function("changing:f"), call(), **PATIENT)().error)


def test_a_system_without_another_thread_is_a_failure_and_no_exception(
    pool: RewardPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as full:
        full.setattr(threading.Thread, "start", refuses)
        outcome = pool.start(function("good"), call(), **PATIENT)()
        assert outcome.error == "got no thread (can't start new thread)"
        with pytest.raises(RewardRefused, match="got no thread"):
            pool.prepare(function("good"))
    assert ask(pool, "good").value == 1.0


def test_what_json_cannot_hold_is_the_calls_failure(pool: RewardPool) -> None:
    assert "got what is not JSON" in str(ask(pool, "good", file=object()).error)
    assert ask(pool, "good", "\ud800 日本\n🙂").value == 0.0
    assert ask(pool, "waits", "x" * 3_000_000).value == 3_000_000


def test_many_threads_may_ask_at_once(pool: RewardPool) -> None:
    values: list[float | None] = []

    def play() -> None:
        for n in range(25):
            values.append(ask(pool, "question_length", str(n)).value)

    threads = [threading.Thread(target=play) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert values == [30.0] * 400 and len(children()) <= 2


def test_waiting_leaves_the_caller_free(pool: RewardPool) -> None:
    pool.prepare(function("backtracks"))
    wait = pool.start(function("backtracks"), call("a" * 40 + "!"), timeout_s=0.5)
    ticks, ends = 0, time.monotonic() + 0.4
    while time.monotonic() < ends:
        time.sleep(0.001)
        ticks += 1
    assert ticks > 10 and wait().timed_out


def test_what_a_function_started_ends_with_it(pool: RewardPool, home: Path) -> None:
    file = home / "pid"
    pool.prepare(function("starts_another"))
    assert pool.start(function("starts_another"), call(file=str(file)), timeout_s=3)().timed_out
    assert gone(lambda: not psutil.pid_exists(int(file.read_text())) or zombie(int(file.read_text())))


def test_closing_ends_children_in_mid_call_at_once() -> None:
    pool = RewardPool()
    pool.prepare(function("sleeps"))
    waiting = [pool.start(function("sleeps"), call("slow"), timeout_s=30) for _ in range(3)]
    time.sleep(0.2)
    began = time.monotonic()
    pool.close()
    assert time.monotonic() - began < 10 and not children()
    assert all(wait().value is None for wait in waiting)


PARENT = """
import os, sys, time
from rollcast_envs.reward_pool import *
shared().prepare(Function("rewards_of_a_user:sleeps"))
shared().start(Function("rewards_of_a_user:sleeps"), RewardCall("", "slow", [], {}), 30.0)
import psutil
time.sleep(0.2)
print(*(child.pid for child in psutil.Process().children()), flush=True)
if sys.argv[1] == "wait":
    time.sleep(30)
"""


@pytest.mark.parametrize("how", ["exits", "is killed"])
def test_children_end_with_their_parent(how: str) -> None:
    mode = "wait" if how == "is killed" else "go"
    with subprocess.Popen([sys.executable, "-c", PARENT, mode], stdout=subprocess.PIPE, text=True, env=env()) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        if how == "is killed":
            os.kill(parent.pid, signal.SIGKILL)
        parent.wait(10)
    assert pids and gone(lambda: not any(psutil.pid_exists(pid) and not zombie(pid) for pid in pids))


def test_a_forked_process_has_a_pool_of_its_own() -> None:
    ours = shared()
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        ours.close()
        os.write(writer, b"other" if shared() is not ours else b"same")
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 10) == b"other" and shared() is ours


def test_figures_are_kept_by_reward() -> None:
    pool = RewardPool(slow_s=0.5)
    pool.count("a", Outcome(value=1.0, seconds=0.25))
    pool.count("a", Outcome(error="late", seconds=0.75, retries=2, timed_out=True))
    pool.count("b", Outcome(error="raised", seconds=0.1))
    figures = pool.report()["a"]
    assert (figures.calls, figures.failures, figures.timeouts, figures.retries) == (2, 1, 1, 2)
    assert (figures.slow_calls, figures.total_s, figures.max_s) == (1, 1.0, 0.75)
    assert pool.report()["b"].failures == 1 and pool.report()["b"].timeouts == 0


def env() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def zombie(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def gone(condition: Callable[[], bool], within_s: float = 5.0) -> bool:
    ends = time.monotonic() + within_s
    while not condition() and time.monotonic() < ends:
        time.sleep(0.02)
    return condition()
