"""Environments of SkyRL-Gym's shape, written from its documented interface, without its package."""

import random
from types import SimpleNamespace
from typing import Any

Messages = list[dict[str, str]]


class Sum:
    """One step; the row of data says what is right. As SkyRL's own `gsm8k`."""

    def __init__(self, env_config: Any = None, extras: dict[str, Any] | None = None) -> None:
        self.truth = (extras or {})["reward_spec"]["ground_truth"]
        self.scale = 1.0 if env_config is None else env_config.reward.scale

    def init(self, prompt: Messages) -> tuple[Messages, dict[str, Any]]:
        return prompt, {}

    def step(self, action: str) -> dict[str, Any]:
        right = float(action == self.truth)
        return {
            "observations": [],
            "reward": right * self.scale,
            "done": True,
            "metadata": {"right": right, "note": "x"},
        }

    def close(self) -> None:
        pass


class Guess:
    """Several steps, a number from the process's `random`, objects in place of dicts, metrics of its own."""

    closed = 0

    def __init__(self, limit: int = 3) -> None:
        self.limit, self.turns, self.number = limit, 0, random.randint(1, 1000)

    def init(self, prompt: Messages) -> tuple[Messages, dict[str, Any]]:
        hint = "even" if self.number % 2 == 0 else "odd"
        return [*prompt, {"role": "user", "content": f"It is {hint}, and in all it is {self.number}."}], {}

    def step(self, action: str) -> Any:
        self.turns += 1
        right = action == str(self.number)
        done = right or self.turns >= self.limit
        told = [] if done else [{"role": "tool", "content": "wrong"}, {"role": "tool", "content": "again"}]
        return SimpleNamespace(observations=told, reward=float(right), done=done, metadata=None)

    def get_metrics(self) -> dict[str, Any]:
        return {"turns": self.turns, "lucky": self.turns == 1, "name": "guess"}

    def close(self) -> None:
        Guess.closed += 1
