"""`rollcast/QA-v0`: one question, one short answer, rewarded by token F1.

Owns: the wording of the questions and the reward. Does not know where facts and texts come from
(`rollcast_envs/data/geography/SOURCE.md` and `reading/SOURCE.md` do) nor how an answer is measured
(`rollcast_envs.rewards` does).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rollcast_envs.errors import DataError
from rollcast_envs.records import Field, Record, Records, open_records
from rollcast_envs.rewards import exact_match, token_f1
from rollcast_envs.tasks.single_turn import SingleTurnTask, Verdict

PHRASINGS = {
    "capital": (
        "What is the capital of {subject}?",
        "Which city is the capital of {subject}?",
        "Name the capital city of {subject}.",
        "The capital of {subject} is which city?",
    ),
    "continent": (
        "Which continent does {subject} belong to?",
        "On which continent would you find {subject}?",
        "Name the continent of {subject}.",
    ),
    "currency": (
        "What is the currency of {subject}?",
        "Which currency is used in {subject}?",
        "Name the currency of {subject}.",
        "What money do people pay with in {subject}?",
    ),
    "country": (
        "In which country is the city of {subject}?",
        "Which country does the city of {subject} belong to?",
        "Name the country in which the city of {subject} lies.",
        "The city of {subject} is in which country?",
    ),
}
ANSWERS = Field("references", "texts", "accepted answers, the preferred one first; an empty list if there are none")
FACT = (Field("subject", "text", "what is asked about"), ANSWERS, Field("kind", "text", "what is asked for"))
"""The built-in facts have no question: it is made of these, in several ways."""


class QAEnv(SingleTurnTask):
    """Questions on geography ("geography", the default), on the names in a sentence ("reading"), or of yours.

    The facts of geography are capitals, continents and currencies, and the countries of large cities, split
    80 / 10 / 10 by group, so that no fact is in two splits, in whatever words. A drawn question is put in one of three
    or four ways; a question chosen by index always in the first.

    A record with a `context` is asked as the context and then the question. Where a record has no references, the
    question has no answer in its context: right are then the empty answer and any of `no_answer` (SQuAD v2's rule).

    Reward: token F1 against the best reference, minus `length_cost` for each character of the answer.
    The cost is there because an untrained model answers in sentences whose samples all score 0, and equal
    rewards teach nothing: with it, the shorter of two wrong answers is already the better one. At 0.001 it
    stays far below what one right word is worth.

    Args:
        split: "train", "validation" or "test".
        kinds: which kinds to ask, such as capital, continent, currency and country; None for all.
        length_cost: reward lost for each character of the answer.
        system_prompt: the system turn of every episode; None for none.
        data: "geography", "reading", or your own questions, with the fields `question`, `references` (a string, or a
            list) and optionally `context`; SQuAD's files, v1.1 and v2.0, are read as they are.
        no_answer: what to answer where a context does not tell, or several such words, the preferred one first. A
            question with a context tells the first; "" for the empty answer alone, which no question tells.
        fields, few_shot: as for every task (`SingleTurnTask`).
    """

    wanted = (
        Field("question", "text", "the question"),
        ANSWERS,
        Field("context", "text", "the text that tells the answer", required=False),
    )
    built_in = {"geography": "geography/facts.jsonl", "reading": "reading/records.jsonl"}  # noqa: RUF012

    def __init__(
        self,
        split: str = "train",
        kinds: Sequence[str] | None = None,
        length_cost: float = 0.001,
        system_prompt: str | None = "Answer with the name only.",
        data: str | Mapping[str, str] | None = None,
        fields: Mapping[str, str] | None = None,
        few_shot: int | Sequence[Sequence[str]] = 0,
        no_answer: str | Sequence[str] = "unanswerable",
    ) -> None:
        if not (math.isfinite(length_cost) and length_cost >= 0):
            raise ValueError(f"length_cost is {length_cost}; expected a finite number that is not negative")
        if kinds is not None and (isinstance(kinds, str) or not kinds):
            raise ValueError(f"kinds is {kinds!r}; expected a list of kinds, or None for all")
        self.kinds, self.length_cost = kinds, length_cost
        self.no_answer = [no_answer] if isinstance(no_answer, str) else list(no_answer) or [""]
        super().__init__(split, data, fields, system_prompt, few_shot)

    def open(self, split: str, data: str | Mapping[str, str] | None, fields: Mapping[str, str] | None) -> Any:
        asks_facts = data is None or data == "geography"
        wanted = FACT if asks_facts else self.wanted
        records = open_records(self._located(data), wanted, split=split, fields=fields)
        return records if self.kinds is None else _of_kinds(records, self.kinds)

    def question(self, record: Record, draw: np.random.Generator | None) -> str:
        if "subject" in record and "question" not in record:
            phrasings = PHRASINGS[record["kind"]]
            return phrasings[0 if draw is None else draw.integers(len(phrasings))].format(subject=record["subject"])
        if not record.get("context"):
            return str(record["question"])
        hint = f'\nIf the text does not say, answer "{self.no_answer[0]}".' if self.no_answer[0] else ""
        return f"{record['context']}\n\n{record['question']}{hint}"

    def references(self, record: Record) -> list[str]:
        return list(record["references"]) or [self.no_answer[0]]

    def judge(self, record: Record, answer: str) -> Verdict:
        references = record["references"]
        says_none = not references and exact_match(answer, self.no_answer)
        said = "" if says_none else answer
        metrics = {"f1": token_f1(said, references), "exact_match": exact_match(said, references)}
        return Verdict({"f1": metrics["f1"], "length": -self.length_cost * len(answer)}, metrics)


def _of_kinds(records: Records, kinds: Sequence[str]) -> Records:
    present = sorted({str(record.get("kind", "")) for record in records})
    if not set(kinds) <= set(present):
        what, why = f"kinds is {kinds!r}", f"the records of this split are of {', '.join(present) or 'no kind'}"
        raise DataError(what, why, "name some of these, or none for all")
    return Records([record for record in records if record.get("kind") in kinds])
