"""A text environment that takes its time: `slow/Letters-v0`, for tests in which waiting weighs more than computing.

Owns: how long a step sleeps, and a reward that a small model can learn. Importing registers it.
"""

import time
from pathlib import Path
from typing import Any

import gymnasium

from rollcast_envs.text import TextSpace


class Letters(gymnasium.Env[str, str]):
    """One turn; its reward is the share of letters in the answer. A step sleeps `seconds`, or what `file` says now."""

    observation_space = TextSpace()
    action_space = TextSpace()

    def __init__(self, seconds: float = 0.0, file: str | None = None) -> None:
        self.seconds = seconds
        self.file = Path(file) if file is not None else None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        return "Spell.", {}

    def step(self, answer: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        time.sleep(self.seconds if self.file is None else float(self.file.read_text()))
        letters = sum(char.isascii() and char.isalpha() for char in answer)
        return "", letters / max(len(answer), 1), True, False, {}


gymnasium.register("slow/Letters-v0", Letters, disable_env_checker=True)
