"""What the peers of `end_to_end.py` share: the questions, the reward, and one printed line a step.

Imports nothing of rollcast: it runs in the peers' own environments too.
"""

import json
import re
import time
from pathlib import Path
from typing import Any


def words(text: str) -> list[str]:
    return [w for w in re.sub(r"[^\w\s]", "", text.lower()).split() if w not in {"a", "an", "the"}]


def f1(answer: str, reference: str) -> float:
    said, right = words(answer), words(reference)
    common = sum(min(said.count(w), right.count(w)) for w in set(said))
    return 2 * common / (len(said) + len(right)) if common else 0.0


def reward_of(answer: str, references: list[str]) -> float:
    """The reward of `rollcast/QA-v0`: token F1 against the best reference, less 0.001 for each character."""
    return max(f1(answer, reference) for reference in references) - 0.001 * len(answer)


def rows_of(questions: Path) -> list[dict[str, Any]]:
    """The driver's questions as TRL's data sets want them: a conversation and the accepted answers."""
    asked = [json.loads(line) for line in questions.read_text(encoding="utf-8").splitlines()]
    return [
        {
            "prompt": [{"role": "system", "content": q["system"]}, {"role": "user", "content": q["question"]}],
            "references": q["references"],
        }
        for q in asked
    ]


class Steps:
    """One line a step on standard output: when it ended, what its samples were worth, and how many tokens each had."""

    def __init__(self) -> None:
        self.rewards: list[float] = []
        self.lengths: list[int] = []

    def note(self, rewards: list[float], lengths: list[int]) -> None:
        self.rewards += rewards
        self.lengths += lengths

    def end(self, step: int) -> None:
        mean = sum(self.rewards) / len(self.rewards)
        line = {"step": step, "time": time.time(), "reward": mean, "lengths": self.lengths}
        print(json.dumps(line), flush=True)
        self.rewards, self.lengths = [], []
