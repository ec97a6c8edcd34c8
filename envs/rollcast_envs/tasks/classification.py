"""`rollcast/Classification-v0`: one text, one of a few labels, rewarded if the label is right.

Owns: the wording, when an answer is a label, and the reward. Does not know where the texts come from
(`rollcast_envs/data/sentiment/SOURCE.md` and `topics/SOURCE.md` do).
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from rollcast_envs.corpus import macro_f1
from rollcast_envs.errors import DataError
from rollcast_envs.records import Field, Record
from rollcast_envs.tasks.labels import distinct, plain
from rollcast_envs.tasks.single_turn import SingleTurnTask, Verdict
from rollcast_envs.text import Answered, CorpusFigure

INSTRUCTIONS = {
    "sentiment": "Which sentiment does this text express?",
    "topics": "What does this text define?",
}


class ClassificationEnv(SingleTurnTask):
    """Tweets that are positive or negative, or definitions of things of seven sorts, or texts and labels of yours.

    Reward: 1 if the answer is the label (case, punctuation and surrounding blanks do not count), else 0; and apart from
    it, as `format`, `partial_credit` for an answer that names exactly one label, whichever it is. That one teaches a
    model that talks to come to the point. `choices` holds the labels, so that an evaluation can allow nothing else.

    Evaluation reports `accuracy`, `valid` (the answer is a label and nothing else) and over all answers `macro_f1`, for
    which an answer that is no label is wrong.

    Args:
        data: "sentiment", "topics", or your own texts, with the fields `text` and `label`.
        labels: all labels there are; None for those of the train split, in alphabetical order. Where your labels are
            whole numbers, these are the names for 0, 1 and so on.
        instruction: the question that follows the text; None for one that fits the built-in data.
        partial_credit: reward for naming exactly one label; 0 for none.
        split, fields, system_prompt, few_shot: as for every task (`SingleTurnTask`).
    """

    wanted = (
        Field("text", "text", "the text to classify"),
        Field("label", "any", "its label"),
    )
    built_in = {"sentiment": "sentiment/records.jsonl", "topics": "topics/records.jsonl"}  # noqa: RUF012

    def __init__(
        self,
        split: str = "train",
        data: str | Mapping[str, str] | None = None,
        labels: Sequence[str] | None = None,
        instruction: str | None = None,
        partial_credit: float = 0.1,
        fields: Mapping[str, str] | None = None,
        system_prompt: str | None = "Answer with the label only.",
        few_shot: int | Sequence[Sequence[str]] = 0,
    ) -> None:
        if not (math.isfinite(partial_credit) and partial_credit >= 0):
            raise ValueError(f"partial_credit is {partial_credit}; expected a finite number that is not negative")
        name = data if isinstance(data, str) else "" if data else "sentiment"
        self.instruction = INSTRUCTIONS.get(name, "Which label fits this text?") if instruction is None else instruction
        self.partial_credit = partial_credit
        self.labels = _valid_labels(labels)
        if not self.labels:
            found = distinct(self.open("train", data, fields), self.references, "labels", data, fields, "train")
            self.labels = _distinguished(found)
        self.choices = self.labels
        self._plain = {plain(label) for label in self.labels}
        self._named = re.compile(rf"(?<!\w)(?:{'|'.join(sorted(map(re.escape, self._plain), key=_longest))})(?!\w)")
        super().__init__(split, data, fields, system_prompt, few_shot)
        self._check_known(distinct(self.records, self.references, "labels", data, fields, split, labels))

    def question(self, record: Record, draw: np.random.Generator | None) -> str:
        return f"{record['text']}\n\n{self.instruction} Answer with one of: {', '.join(self.labels)}."

    def references(self, record: Record) -> list[str]:
        label = record["label"]
        if isinstance(label, int) and not isinstance(label, bool):
            label = self.labels[label] if 0 <= label < len(self.labels) else str(label)
        if not isinstance(label, str) or not plain(label):
            where, why = f"record {record['id']!r}, field 'label'", f"holds {label!r}, which is no label"
            raise DataError(where, why, "give a text with a letter or a digit in it, or a whole number")
        return [label]

    def kind(self, record: Record) -> str:
        """The record's own kind, else its label: figures by kind are then the recall of each label."""
        return str(record.get("kind") or self.references(record)[0])

    def judge(self, record: Record, answer: str) -> Verdict:
        said = plain(answer)
        right = float(said == plain(self.references(record)[0]))
        rewards = {"accuracy": right}
        if self.partial_credit:
            rewards["format"] = self.partial_credit * (len(set(self._named.findall(said))) == 1)
        return Verdict(rewards, {"accuracy": right, "valid": float(said in self._plain)})

    @classmethod
    def corpus_metrics(cls, answered: Sequence[Answered]) -> dict[str, CorpusFigure]:
        pairs = [(plain(one.answer), plain(one.references[0])) for one in answered]
        return {"macro_f1": CorpusFigure(macro_f1(pairs))} if pairs else {}

    def _check_known(self, found: Iterable[str]) -> None:
        if unknown := [label for label in found if plain(label) not in self._plain]:
            why = f"it is none of {', '.join(self.labels)}"
            raise DataError(
                f"label {unknown[0]!r} of the records", why, "correct it, or name all labels: labels = [...]"
            )


def _valid_labels(labels: Sequence[str] | None) -> tuple[str, ...]:
    if labels is None:
        return ()
    if isinstance(labels, str) or not labels or not all(isinstance(label, str) for label in labels):
        raise ValueError(f'labels is {labels!r}; expected a list of texts, as ["no", "yes"], or None')
    return _distinguished(labels)


def _distinguished(labels: Sequence[str]) -> tuple[str, ...]:
    """The labels, if answers can tell them apart."""
    seen: dict[str, str] = {}
    for label in labels:
        other = seen.setdefault(plain(label), label)
        if other is not label or not plain(label):
            why = f"cannot be told from {other!r}" if plain(label) else "has no letter and no digit"
            fix = (
                "choose labels that differ in letters or digits: case, punctuation and symbols do not count in answers"
            )
            raise DataError(f"label {label!r}", why, fix)
    return tuple(labels)


def _longest(label: str) -> tuple[int, str]:
    return -len(label), label
