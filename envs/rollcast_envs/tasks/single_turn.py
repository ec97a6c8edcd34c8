"""One record, one question, one answer: what all tasks on a data set share.

Owns: choosing a record, few-shot examples, and the form of `info`. Does not know file formats (`records.py`), nor what
is asked and how it is judged: a task says that in four short methods.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from rollcast_envs.errors import DataError
from rollcast_envs.records import Field, Record, open_records
from rollcast_envs.splits import portion_named
from rollcast_envs.text import TextEnv


@dataclass(frozen=True)
class Verdict:
    """What one answer is worth. Task -> info.

    The step's reward is the sum of `rewards`: the task's own measure, and apart from it each term of shaping (such as
    `length`). `metrics` are what evaluation reports; shaping is never among them.
    """

    rewards: dict[str, float]
    metrics: dict[str, float] = field(default_factory=dict)


class SingleTurnTask(TextEnv):
    """A task whose episodes are one question and one answer, on records of a data set.

    An episode always terminates and is never truncated. A drawn question may be put in several ways; one chosen by
    index is always put in the same words.

    Args:
        split: "train", "validation" or "test"; for k-fold validation also a part of train (`splits.portion_named`).
        data: a file (.jsonl, .csv, .tsv, .parquet, or SQuAD's .json), a Hugging Face data set, one for each split as
            {"train": ..., "validation": ...}, or the name of a built-in data set; None is the first built-in one.
        fields: which of your columns holds what, as {"question": "body", "references": "answer"}.
        system_prompt: the system turn of every episode; None for none.
        few_shot: how many records of the train split open every episode as examples, or the examples themselves as
            [[question, answer], ...].

    Raises:
        DataError: when the data cannot be read as this task needs them; it names file, line and field.
    """

    folds = True

    built_in: ClassVar[Mapping[str, str]]
    """Built-in data sets: name -> file below `rollcast_envs/data`, the default first."""

    wanted: ClassVar[tuple[Field, ...]]
    """What the task needs of a record."""

    def __init__(
        self,
        split: str = "train",
        data: str | Mapping[str, str] | None = None,
        fields: Mapping[str, str] | None = None,
        system_prompt: str | None = None,
        few_shot: int | Sequence[Sequence[str]] = 0,
    ) -> None:
        super().__init__()
        examples_from = portion_named(split).training
        self.records = self.open(split, data, fields)
        self.system_prompt = system_prompt
        self.few_shot = self._examples(few_shot, examples_from, data, fields)
        # A record that is shown as an example, answer and all, is not asked about.
        self._shown = len(self.few_shot) if split == examples_from and isinstance(few_shot, int) else 0
        self.size = len(self.records) - self._shown
        if self.size < 1:
            raise DataError(
                f"few_shot = {few_shot}: nothing is left to ask",
                f"the split {split} has {len(self.records)} records, and those shown as examples are not asked about",
                "lower few_shot, or give the examples themselves",
            )
        self.record: Record = {}

    @abstractmethod
    def question(self, record: Record, draw: np.random.Generator | None) -> str:
        """The user's turn. With `draw` its wording may be drawn; without, it is always the same."""

    @abstractmethod
    def references(self, record: Record) -> list[str]:
        """Accepted answers, the preferred one first: what `sft` trains on. Empty if there are none."""

    @abstractmethod
    def judge(self, record: Record, answer: str) -> Verdict:
        """What `answer` is worth."""

    def kind(self, record: Record) -> str:
        """What sort of task the record is; figures are reported by kind."""
        return str(record.get("kind") or "")

    def open(self, split: str, data: str | Mapping[str, str] | None, fields: Mapping[str, str] | None) -> Any:
        """The records to ask about."""
        return open_records(self._located(data), self.wanted, split=split, fields=fields)

    def begin(self, index: int | None) -> tuple[str, dict[str, Any]]:
        drawn = index is None
        place = int(self.np_random.integers(len(self.records) - self._shown)) if index is None else index
        self.record = self.records[self._shown + place]
        return self.question(self.record, self.np_random if drawn else None), self._info()

    def respond(self, answer: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        verdict = self.judge(self.record, answer)
        info = self._info() | {"rewards": verdict.rewards, "metrics": verdict.metrics}
        return "", sum(verdict.rewards.values()), True, False, info

    def _info(self) -> dict[str, Any]:
        return {
            "task_id": str(self.record["id"]),
            "kind": self.kind(self.record),
            "references": self.references(self.record),
            "fields": self.record,
        }

    def _located(self, data: str | Mapping[str, str] | None) -> str | Mapping[str, str]:
        """A built-in data set by its file; anything else as it is."""
        if isinstance(data, Mapping):
            return data
        if data is None and not self.built_in:
            raise DataError(f"{type(self).__name__} has no data", "it has no built-in data set", "pass data=...")
        name = next(iter(self.built_in)) if data is None else data
        if name in self.built_in:
            return str(files("rollcast_envs.data") / self.built_in[name])
        if not Path(name).exists() and (near := get_close_matches(name, self.built_in)):
            raise DataError(
                f"there is no data set {name!r}",
                f"it is no file, and the built-in ones are {', '.join(self.built_in)}",
                f"write {near[0]!r}, or the name of a file",
            )
        return name

    def _examples(
        self, few_shot: int | Sequence[Sequence[str]], split: str, data: Any, fields: Mapping[str, str] | None
    ) -> tuple[tuple[str, str], ...]:
        if not isinstance(few_shot, int):
            return tuple((str(question), str(answer)) for question, answer in few_shot)
        if not few_shot:
            return ()
        records = self.open(split, data, fields)
        chosen = [records[index] for index in range(min(few_shot, len(records)))]
        unanswered = next((record for record in chosen if not self.references(record)), None)
        if unanswered is not None:
            raise DataError(
                f"few_shot = {few_shot}: the record {unanswered['id']!r} cannot be shown as an example",
                "it has no reference, and an example needs an answer",
                "give the examples themselves, as [[question, answer], ...]",
            )
        return tuple((self.question(record, None), self.references(record)[0]) for record in chosen)
