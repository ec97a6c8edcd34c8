"""`rollcast/ReasoningGym-v0`: the 105 task generators of the package reasoning-gym, each with its own judge.

Owns: which generated question is in which split, and which answers may reach a judge. Does not know how a task is made
or judged: reasoning-gym does.
"""

import json
import os
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from threading import Lock
from typing import Any

from rollcast_envs.adapters.harmless import is_expression, is_literal
from rollcast_envs.adapters.outside import UNREADABLE, OwnRandomness, required, silence
from rollcast_envs.errors import DataError
from rollcast_envs.splits import Split, position, valid_split
from rollcast_envs.text import TextEnv

VERSION = "0.1.25"
PACKAGE = f"reasoning-gym=={VERSION}"
SHARES: dict[Split, tuple[int, ...]] = {"train": (0, 1), "validation": (2,), "test": (3,)}
"""Quarters of all questions, by the hash of their text."""
LANES = 12
"""Questions that are generated at most for one of a split before the next ones' are looked at."""
MAX_TRIES = 400

EVALUATED = {
    **dict.fromkeys(("binary_matrix", "n_queens", "spiral_matrix", "string_insertion"), is_literal),
    **dict.fromkeys(("countdown", "polynomial_multiplication", "puzzle24"), is_expression),
    **dict.fromkeys(("intermediate_integration", "simple_integration"), is_expression),
}
"""Tasks whose judge evaluates the answer as Python, or has sympy do so (version 0.1.25), and what may reach it."""
BY_HASH_SEED = frozenset(("isomorphic_strings", "polynomial_multiplication", "ransom_note"))
"""Tasks that iterate over sets: equal seeds give other questions in another process, unless PYTHONHASHSEED is set."""


class ReasoningGymEnv(TextEnv):
    """Puzzles, arithmetic, logic and games from reasoning-gym: one generated question, one judged answer.

    Splits are made by the text of a question: half of all questions are train, a quarter each validation and test, in
    every process. So a small space, such as sums of two digits, leaks nothing from test into train.

    Reward: the score of the task's own judge, from 0 to 1; an answer that the judge cannot read scores 0. So does one
    that it would evaluate as Python code and that is more than a literal or plain arithmetic.

    Args:
        task: a name of reasoning-gym, such as "chain_sum", "course_schedule" or "sudoku".
        split: "train", "validation" or "test".
        size: how many questions the split has.
        options: the task's own options, such as {"max_terms": 3, "max_digits": 1}. Its defaults are hard.
        seed: generates other questions.
        system_prompt: the system turn of every episode; None for none.

    Raises:
        DataError: when reasoning-gym is missing or of another version, does not know the task or its options, or
            generates too few different questions for three splits.
    """

    def __init__(
        self,
        task: str = "chain_sum",
        split: Split = "train",
        size: int = 1000,
        options: Mapping[str, Any] | None = None,
        seed: int = 0,
        system_prompt: str | None = "Answer with the result only.",
    ) -> None:
        super().__init__()
        if size < 1 or seed < 0:
            raise ValueError(f"size is {size} and seed {seed}; expected at least 1 question and a seed from 0")
        self.task, self.size, self.system_prompt = task, size, system_prompt
        self._count = size
        self._share = SHARES[valid_split(split)]
        self._questions = _dataset(task, LANES * size, seed, dict(options or {}))
        _, self._entry = self._question(0)
        self._info: dict[str, Any] = {}
        if task in BY_HASH_SEED and not os.environ.get("PYTHONHASHSEED", "").isdigit():
            told = f"{task}: equal seeds ask other questions in another process; set PYTHONHASHSEED=0 to prevent that"
            warnings.warn(told, UserWarning, stacklevel=2)

    def begin(self, index: int | None) -> tuple[str, dict[str, Any]]:
        number, self._entry = self._question(int(self.np_random.integers(self._count)) if index is None else index)
        question, answer = str(self._entry["question"]), self._entry.get("answer")
        references = [] if answer is None else [str(answer)]
        fields = {"question": question, "answer": references[0] if references else None}
        task_id = f"{self.task}:{number}"
        self._info = {"task_id": task_id, "kind": self.task, "references": references, "fields": fields}
        return question, self._info

    def respond(self, answer: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        score = self._score(answer.strip())
        metrics = {"score": score, "solved": float(score >= 1.0)}
        return "", score, True, False, self._info | {"rewards": {"score": score}, "metrics": metrics}

    def _question(self, index: int) -> tuple[int, dict[str, Any]]:
        """The first question of this split among those that `index` stands for: its number and what it is."""
        total = LANES * self._count
        for attempt in range(min(total, MAX_TRIES)):
            number = (index + attempt * self._count + attempt // LANES) % total
            with OwnRandomness(number).entered():
                entry = self._questions[number]
            if position(str(entry["question"])) % 4 in self._share:
                return number, entry
        why = f"none of {min(total, MAX_TRIES)} generated questions falls into this split: the task asks too few things"
        raise DataError(f"{self.task} with these options has too few questions", why, "give it wider options")

    def _score(self, answer: str) -> float:
        if not self._may_be_judged(answer):
            return 0.0
        try:
            return float(self._questions.score_answer(answer=answer, entry=self._entry))
        except UNREADABLE:
            return 0.0

    def _may_be_judged(self, answer: str) -> bool:
        harmless = EVALUATED.get(self.task)
        stored = (self._entry["answer"], *self._entry.get("metadata", {}).get("valid_answers", ()))
        return harmless is None or answer in stored or harmless(answer)


_DATASETS: dict[str, Any] = {}
_MAKING = Lock()


def _dataset(task: str, size: int, seed: int, options: Mapping[str, Any]) -> Any:
    """The generator of a task, one for all environments of this process: some take seconds to make."""
    key = json.dumps([task, size, seed, options], sort_keys=True, default=repr)
    with _MAKING:
        if key not in _DATASETS:
            _DATASETS[key] = _made(task, size, seed, options)
        return _DATASETS[key]


def _made(task: str, size: int, seed: int, options: Mapping[str, Any]) -> Any:
    required("reasoning_gym", PACKAGE)
    found = version("reasoning-gym")
    if found != VERSION:
        why = "some of its judges evaluate answers as Python code, and which ones is known for the other version only"
        raise DataError(f"reasoning-gym {found} is installed instead of {VERSION}", why, f"pip install '{PACKAGE}'")
    factory = required("reasoning_gym.factory", PACKAGE)
    if task == "composite" or task not in factory.DATASETS:
        why = "it is a mixture" if task == "composite" else "reasoning-gym has no such task"
        known = sorted(set(factory.DATASETS) - {"composite"})
        raise DataError(f"task is {task!r}", why, f"use one of {', '.join(known)}")
    silence(factory.DATASETS[task][0])
    try:
        with OwnRandomness(seed).entered():
            return factory.create_dataset(task, seed=seed, size=size, **options)
    except (AssertionError, TypeError, ValueError) as error:
        known = sorted(set(factory.DATASETS[task][1].__dataclass_fields__) - {"seed", "size"})
        raise DataError(f"options of {task} are refused", str(error), f"its options are {', '.join(known)}") from error
