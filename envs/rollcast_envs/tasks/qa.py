"""`rollcast/QA-v0`: one question on geography, one short answer, rewarded by token F1.

Owns the wording of the questions and the reward. Does not know where the facts come from
(`rollcast_envs.data.geography` does) nor how an answer is measured (`rollcast_envs.rewards` does).
"""

import math
from collections.abc import Sequence
from typing import Any

from rollcast_envs.data.geography import KINDS, Fact, load_facts
from rollcast_envs.rewards import exact_match, token_f1
from rollcast_envs.splits import Split, position, split_of, valid_split
from rollcast_envs.text import TextEnv

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


class QAEnv(TextEnv):
    """Questions on capitals, continents and currencies, and on the countries of large cities.

    An episode is one question and one answer; it always terminates and is never truncated. The facts are
    split 80 / 10 / 10 by group, so that no fact is in two splits, in whatever words. A drawn question is
    put in one of three or four ways; a question chosen by index always in the first.

    Reward: token F1 against the best reference, minus `length_cost` for each character of the answer.
    The cost is there because an untrained model answers in sentences whose samples all score 0, and equal
    rewards teach nothing: with it, the shorter of two wrong answers is already the better one. At 0.001 it
    stays far below what one right word is worth.

    Args:
        split: "train", "validation" or "test".
        kinds: which of capital, continent, currency and country to ask for; None for all.
        length_cost: reward lost for each character of the answer.
        system_prompt: the system turn of every episode; None for none.
    """

    def __init__(
        self,
        split: Split = "train",
        kinds: Sequence[str] | None = None,
        length_cost: float = 0.001,
        system_prompt: str | None = "Answer with the name only.",
    ) -> None:
        super().__init__()
        if not (math.isfinite(length_cost) and length_cost >= 0):
            raise ValueError(f"length_cost is {length_cost}; expected a finite number that is not negative")
        self.facts = facts_of(valid_split(split), _valid_kinds(kinds))
        self.size = len(self.facts)
        self.length_cost = length_cost
        self.system_prompt = system_prompt
        self.fact = self.facts[0]

    def begin(self, index: int | None) -> tuple[str, dict[str, Any]]:
        self.fact, phrasing = self._draw() if index is None else (self.facts[index], 0)
        return PHRASINGS[self.fact.kind][phrasing].format(subject=self.fact.subject), self._info()

    def respond(self, answer: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        references = self.fact.references
        metrics = {"f1": token_f1(answer, references), "exact_match": exact_match(answer, references)}
        reward = metrics["f1"] - self.length_cost * len(answer)
        return "", reward, True, False, {**self._info(), "metrics": metrics}

    def _draw(self) -> tuple[Fact, int]:
        fact = self.facts[self.np_random.integers(len(self.facts))]
        return fact, int(self.np_random.integers(len(PHRASINGS[fact.kind])))

    def _info(self) -> dict[str, Any]:
        return {"task_id": self.fact.id, "kind": self.fact.kind, "references": list(self.fact.references)}


def facts_of(split: Split, kinds: Sequence[str] = KINDS) -> list[Fact]:
    """The facts of a split, shuffled once and for all, so that every prefix mixes the kinds."""
    chosen = [fact for fact in load_facts() if fact.kind in kinds and split_of(fact.group) == split]
    return sorted(chosen, key=lambda fact: position(fact.id))


def _valid_kinds(kinds: Sequence[str] | None) -> Sequence[str]:
    if kinds is None:
        return KINDS
    if isinstance(kinds, str) or not kinds or not set(kinds) <= set(KINDS):
        raise ValueError(f"kinds is {kinds!r}; expected a list with some of {', '.join(KINDS)}, or None for all")
    return kinds
