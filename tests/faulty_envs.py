"""Text environments that misbehave, each in one named way, and a well-behaved one to compare with.

Importing registers `faulty/Broken-v0`, `faulty/Flaky-v0` and `faulty/Turns-v0`. Gymnasium's own checker is off
for them: what is tested is what rollcast does about them.
"""

import asyncio
import math
import time
from collections import Counter
from typing import Any, ClassVar

import gymnasium
import numpy as np

GOOD_RESET = ("Say anything.", {})
GOOD_STEP = ("", 1.0, True, False, {})

RESETS: dict[str, Any] = {
    "observation None": (None, {}),
    "observation 7": (7, {}),
    "lone surrogate": ("\ud800", {}),
    "not a tuple": "Say anything.",
    "triple": ("Say anything.", {}, {}),
    "info None": ("Say anything.", None),
    "info list": ("Say anything.", ["kind"]),
}
STEPS: dict[str, Any] = {
    "None": None,
    "four values": ("", 1.0, True, {}),
    "list": ["", 1.0, True, False, {}],
    "observation None": (None, 1.0, True, False, {}),
    "observation bytes": (b"", 1.0, True, False, {}),
    "lone surrogate": ("\udfff", 1.0, False, False, {}),
    "reward None": ("", None, True, False, {}),
    "reward string": ("", "1.0", True, False, {}),
    "reward NaN": ("", math.nan, True, False, {}),
    "reward inf": ("", -math.inf, True, False, {}),
    "reward huge int": ("", 10**400, True, False, {}),
    "reward complex": ("", 1j, True, False, {}),
    "reward array": ("", np.ones(2), True, False, {}),
    "terminated None": ("", 1.0, None, False, {}),
    "truncated array": ("", 1.0, False, np.array([True, False]), {}),
    "info None": ("", 1.0, True, False, None),
    "metrics None": ("", 1.0, True, False, {"metrics": None}),
    "metric string": ("", 1.0, True, False, {"metrics": {"f1": "high"}}),
    "metric NaN": ("", 1.0, True, False, {"metrics": {"f1": math.nan}}),
}
RAISED: dict[str, BaseException] = {
    "error": RuntimeError("the dice fell off the table"),
    "stop iteration": StopIteration("no more questions"),
    "timeout": TimeoutError("the judge's web service"),
    "exit": SystemExit(3),
    "interrupt": KeyboardInterrupt("by itself"),
    "cancelled": asyncio.CancelledError("by itself"),
}


class Broken(gymnasium.Env[str, str]):
    """Fails at `at` ("make", "reset", "step" or "close"): raises `RAISED[how]`, hangs, or returns nonsense."""

    def __init__(self, at: str, how: str, hang_s: float = 0.5) -> None:
        self.at, self.how, self.hang_s = at, how, hang_s
        self.system_prompt: Any = 7 if (at, how) == ("make", "system prompt 7") else None
        self._misbehave("make", {})

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        return self._misbehave("reset", RESETS, GOOD_RESET)

    def step(self, action: str) -> Any:
        return self._misbehave("step", STEPS, GOOD_STEP)

    def close(self) -> None:
        self._misbehave("close", {})

    def _misbehave(self, at: str, results: dict[str, Any], good: Any = None) -> Any:
        if at != self.at:
            return good
        if self.how in RAISED:
            raise RAISED[self.how]
        if self.how == "hang":
            time.sleep(self.hang_s)
        return results.get(self.how, good)


class Flaky(gymnasium.Env[str, str]):
    """The first `failures` environments made under `name` raise in `step`; those after them work."""

    made: ClassVar[Counter[str]] = Counter()

    def __init__(self, name: str, failures: int) -> None:
        Flaky.made[name] += 1
        self.number, self.failures = Flaky.made[name], failures

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        return "Say anything.", {}

    def step(self, action: str) -> Any:
        if self.number <= self.failures:
            raise RuntimeError(f"environment {self.number} broke")
        return "", 1.0, True, False, {"metrics": {"number": self.number}}


class Turns(gymnasium.Env[str, str]):
    """Pays `rewards` one a turn; after the last it ends as `end` says ("terminated", "truncated") or never."""

    def __init__(self, rewards: tuple[float, ...] = (0.25, -1.0, 2.0), end: str = "terminated") -> None:
        self.rewards, self.end = rewards, end
        self.system_prompt = "Be brief."
        self.turn = 0
        self.answers: list[str] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self.turn, self.answers = 0, []
        return f"Question 0 of {seed} {options}", {"kind": "opening"}

    def step(self, action: str) -> Any:
        self.answers.append(action)
        reward = self.rewards[self.turn % len(self.rewards)]
        self.turn += 1
        over = self.turn == len(self.rewards)
        info = {"kind": "turns", "metrics": {"answers": len(self.answers)}} if over else {}
        terminated, truncated = over and self.end == "terminated", over and self.end == "truncated"
        return f"Question {self.turn}", reward, terminated, truncated, info


class Sometimes(gymnasium.Env[str, str]):
    """Breaks in `step` for the share `p` of all seeds, always for the same ones."""

    def __init__(self, p: float) -> None:
        self.p = p
        self.breaks = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self.breaks = np.random.default_rng(seed).random() < self.p
        return "Say anything.", {}

    def step(self, action: str) -> Any:
        if self.breaks:
            raise RuntimeError("this seed breaks")
        return "", float(len(action)) / 100, True, False, {}


for _environment in (Broken, Flaky, Turns, Sometimes):
    gymnasium.register(
        f"faulty/{_environment.__name__}-v0",
        entry_point=_environment,
        disable_env_checker=True,
        order_enforce=False,
    )
