"""`quiz:Quiz-v0`: a few questions one after the other, each answered in a turn of its own, with a pause a step.

Both sides of `end_to_end.py multiturn` play this very class: rollcast as a Gymnasium environment, the peer in its
`rollout_func`. It knows Gymnasium alone. The pause stands for what an environment waits for: a database, a browser, a
judge behind a URL; it is `time.sleep`, which uses no processor.
"""

import json
import time
from pathlib import Path
from typing import Any

import gymnasium
from peer_task import reward_of


class QuizEnv(gymnasium.Env[str, str]):
    """An episode asks `turns` consecutive questions of a JSON-lines file; each answer has its own reward."""

    def __init__(self, questions: str, turns: int = 4, step_seconds: float = 0.1, split: str = "train") -> None:
        self.questions = [json.loads(line) for line in Path(questions).read_text(encoding="utf-8").splitlines()]
        self.turns, self.step_seconds = turns, step_seconds
        self.system_prompt = self.questions[0]["system"]
        self.observation_space = self.action_space = gymnasium.spaces.Text(10_000)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        drawn = int(self.np_random.integers(len(self.questions)))
        self.next, self.left = (options or {}).get("index", drawn), self.turns
        return self._ask(), {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        time.sleep(self.step_seconds)
        reward = reward_of(action, self.asked["references"])
        return (self._ask(), reward, False, False, {}) if self.left else ("", reward, True, False, {})

    def _ask(self) -> str:
        self.asked = self.questions[self.next % len(self.questions)]
        self.next, self.left = self.next + 1, self.left - 1
        question: str = self.asked["question"]
        return question


gymnasium.register(id="Quiz-v0", entry_point=f"{__name__}:QuizEnv")
