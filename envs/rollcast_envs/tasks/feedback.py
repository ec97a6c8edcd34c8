"""`rollcast/Feedback-v0`: what people asked a served policy, rewarded by what they said of its answers.

Owns: how a judged question is asked again, and its reward. Does not know where verdicts are collected: a file of
`rollcast feedback export` has what is wanted here, and so may any other.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rollcast_envs.errors import DataError
from rollcast_envs.fields import described
from rollcast_envs.records import Field, Record
from rollcast_envs.rewards import chrf, exact_match, judged, rouge, token_f1
from rollcast_envs.tasks.single_turn import SingleTurnTask, Verdict

MEASURES = {"chrf": chrf, "token_f1": token_f1, "rouge": rouge, "exact_match": exact_match}
EXAMPLE = '[{"answer": "Lima", "value": 1.0}, {"answer": "Cusco", "value": -1.0}]'


class FeedbackEnv(SingleTurnTask):
    """Questions of people, each with answers that were judged.

    Reward: likeness to the answer that was liked most, less likeness to the one disliked most
    (`rollcast_envs.rewards.judged`), minus `length_cost` for each character of the answer. It says how near an answer
    is to what people liked, not whether it is right: no better judge of new answers is claimed.

    A conversation is asked again up to its last question, with its own system turn. Figures: `feedback`, the reward
    without the cost of length, and `liked`, the likeness to the best of the liked answers.

    Args:
        split: "train", "validation" or "test"; all verdicts on one question are in one split.
        data: a file with the fields `question`, `references` (what was liked, the best first), `judged` (every answer
            and its value from -1 to 1) and optionally `system` and `history` ([[question, answer], ...]).
        measure: what likeness is: "chrf" (any language), "token_f1", "rouge" or "exact_match".
        length_cost: reward lost for each character of the answer.
        system_prompt: the system turn of questions that had none.
        fields, few_shot: as for every task (`SingleTurnTask`); the examples come before a question's own history.
    """

    wanted = (
        Field("question", "text", "what was asked last"),
        Field("references", "texts", "answers that were liked, the best first; an empty list if none was"),
        Field("judged", "any", f"answers and what each is worth, as {EXAMPLE}"),
        Field("system", "text", "the system turn of the conversation", required=False),
        Field("history", "any", "what was said before, as [[question, answer], ...]", required=False),
    )
    built_in = {}  # noqa: RUF012

    def __init__(
        self,
        split: str = "train",
        data: str | Mapping[str, str] | None = None,
        measure: str = "chrf",
        length_cost: float = 0.0,
        system_prompt: str | None = None,
        fields: Mapping[str, str] | None = None,
        few_shot: int | Sequence[Sequence[str]] = 0,
    ) -> None:
        if measure not in MEASURES:
            raise ValueError(f"measure is {measure!r}; expected one of {', '.join(MEASURES)}")
        if not (math.isfinite(length_cost) and length_cost >= 0):
            raise ValueError(f"length_cost is {length_cost}; expected a finite number that is not negative")
        self.measure, self.length_cost = MEASURES[measure], length_cost
        super().__init__(split, data, fields, system_prompt, few_shot)
        self._usual_system, self._examples_shown = self.system_prompt, self.few_shot

    def begin(self, index: int | None) -> tuple[str, dict[str, Any]]:
        begun = super().begin(index)
        self.system_prompt = self.record.get("system") or self._usual_system
        self.few_shot = (*self._examples_shown, *_history(self.record))
        return begun

    def question(self, record: Record, draw: np.random.Generator | None) -> str:
        return str(record["question"])

    def references(self, record: Record) -> list[str]:
        return list(record["references"])

    def judge(self, record: Record, answer: str) -> Verdict:
        value = judged(answer, _verdicts(record), self.measure)
        liked = max((self.measure(answer, [text]) for text in record["references"]), default=0.0)
        return Verdict(
            {"feedback": value, "length": -self.length_cost * len(answer)}, {"feedback": value, "liked": liked}
        )


def _verdicts(record: Record) -> list[tuple[str, float]]:
    rows = record["judged"]
    if isinstance(rows, list) and rows and all(map(_is_verdict, rows)):
        return [(row["answer"], float(row["value"])) for row in rows]
    raise DataError(f"record {record['id']!r}, field 'judged'", f"it holds {described(rows)}", f"write {EXAMPLE}")


def _is_verdict(row: object) -> bool:
    if not (isinstance(row, dict) and isinstance(row.get("answer"), str)):
        return False
    value = row.get("value")
    return isinstance(value, int | float) and not isinstance(value, bool) and -1 <= value <= 1


def _history(record: Record) -> tuple[tuple[str, str], ...]:
    turns = record.get("history") or []
    if isinstance(turns, list) and all(_is_turn(turn) for turn in turns):
        return tuple((question, answer) for question, answer in turns)
    fix = 'write [["a question", "its answer"], ...], or leave it out'
    raise DataError(f"record {record['id']!r}, field 'history'", f"it holds {described(turns)}", fix)


def _is_turn(turn: object) -> bool:
    return isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)
