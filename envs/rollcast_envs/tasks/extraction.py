"""`rollcast/Extraction-v0`: one text, the named entities in it, rewarded by the F1 of the list.

Owns: the form of the answer and how it is read, and the reward. Does not know where the sentences come from
(`rollcast_envs/data/entities/SOURCE.md` does).
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rollcast_envs.corpus import entity_f1
from rollcast_envs.errors import DataError
from rollcast_envs.records import Field, Record
from rollcast_envs.tasks.labels import distinct, plain
from rollcast_envs.tasks.single_turn import SingleTurnTask, Verdict
from rollcast_envs.text import Answered, CorpusFigure

Entity = tuple[str, str]
"""Type and text, each in the form in which answers are compared."""

NONE = "none"
"""The answer where a text names nothing."""
MEANINGS = {"PER": "person", "LOC": "place", "ORG": "organisation"}
SAME_TYPE = {
    "person": "per", "people": "per", "location": "loc", "place": "loc", "organisation": "org", "organization": "org"
}  # fmt: skip
INSTRUCTION = (
    "List the named entities in the text, each on a line of its own, as TYPE: name. The types are {types}. "
    "If there are none, answer: none"
)
LINE = re.compile(r"[\n;]")
MARK = re.compile(r"\s*(?:[-*•–]|\d{1,3}[.)])?\s*")
"""What a list may have before an entry."""
TYPE_WORDS, TYPE_LENGTH = 3, 80
"""What stands before a colon and has more words, or characters, is no type but a sentence."""
FORM = 'give a list, as [{"type": "LOC", "text": "New York"}] or ["LOC: New York"], which may be empty'


class ExtractionEnv(SingleTurnTask):
    """Sentences and the people, places and organisations that they name, derived from WordNet; or texts of yours.

    The answer has one entity a line, as `LOC: New York`, in any order, or is `none`. Bullets, numbers, bold type, case,
    punctuation and a leading "the" do not count, and lines that are no entities are passed over.

    Reward: F1 of the answer's set of (type, text) against the record's; 1 where both are empty. An entity counts only
    whole, with its type. Evaluation adds `entity_f1`, micro-averaged over all answers.

    Args:
        data: your own texts, with the fields `text` and `entities`: a list of {"type": ..., "text": ...} or of
            "TYPE: text". It may be empty.
        types: the types to ask for, for the system turn; None for those of the train split.
        system_prompt: None for one that tells the form of the answer and the types; "" for no system turn.
        split, fields, few_shot: as for every task (`SingleTurnTask`).
    """

    wanted = (
        Field("text", "text", "the text that names entities"),
        Field("entities", "any", "the entities in it"),
    )
    built_in = {"entities": "entities/records.jsonl"}  # noqa: RUF012

    def __init__(
        self,
        split: str = "train",
        data: str | Mapping[str, str] | None = None,
        types: Sequence[str] | None = None,
        fields: Mapping[str, str] | None = None,
        system_prompt: str | None = None,
        few_shot: int | Sequence[Sequence[str]] = 0,
    ) -> None:
        if types is not None and (isinstance(types, str) or not types):
            raise ValueError(f'types is {types!r}; expected a list of types, as ["LOC", "PER"], or None')
        super().__init__(split, data, fields, None, few_shot)
        distinct(self.records, _types, "types", data, fields, split)
        if system_prompt is None:
            found = types or distinct(self.open("train", data, fields), _types, "types", data, fields, "train")
            system_prompt = INSTRUCTION.format(types=", ".join(map(_explained, found)))
        self.system_prompt = system_prompt or None

    def question(self, record: Record, draw: np.random.Generator | None) -> str:
        return str(record["text"])

    def references(self, record: Record) -> list[str]:
        return [rendered(entities_of(record))]

    def judge(self, record: Record, answer: str) -> Verdict:
        said, gold = parsed(answer), parsed(rendered(entities_of(record)))
        shared = len(said & gold)
        f1 = entity_f1([said], [gold]) if said or gold else 1.0
        precision, recall = (shared / len(part) if part else float(said == gold) for part in (said, gold))
        return Verdict({"f1": f1}, {"f1": f1, "precision": precision, "recall": recall, "exact": float(said == gold)})

    @classmethod
    def corpus_metrics(cls, answered: Sequence[Answered]) -> dict[str, CorpusFigure]:
        said = [parsed(one.answer) for one in answered]
        gold = [parsed(one.references[0]) for one in answered]
        return {"entity_f1": CorpusFigure(entity_f1(said, gold))}


def parsed(answer: str) -> set[Entity]:
    r"""The entities that an answer lists, in comparable form; never raises.

    >>> sorted(parsed("Here they are:\n- **LOC**: New York.\n2) person = Ada Lovelace; ORG: the UN"))
    [('loc', 'new york'), ('org', 'un'), ('per', 'ada lovelace')]
    >>> parsed("none"), parsed("")
    (set(), set())
    """
    found = (_entity(line) for line in LINE.split(answer))
    return {entity for entity in found if entity is not None}


def rendered(entities: Sequence[Entity]) -> str:
    """The answer that lists them."""
    lines = [f"{_on_a_line(kind.replace(':', ' '))}: {_on_a_line(text)}" for kind, text in entities]
    return "\n".join(lines) or NONE


def entities_of(record: Record) -> list[Entity]:
    """The entities of a record as they are written in it. Raises `DataError`."""
    value = record["entities"]
    if isinstance(value, str):
        value = _listed(value, record)
    if not isinstance(value, list):
        raise _fault(record, value)
    return [_written(item, record) for item in value]


def _entity(line: str) -> Entity | None:
    line = line[MARK.match(line).end() :]  # type: ignore[union-attr]
    places = [place for mark in (":", "=", "|", "\t", " - ", " – ") if (place := line.find(mark)) > 0]
    if not places or min(places) > TYPE_LENGTH:
        return None
    kind, text = plain(line[: min(places)]), plain(line[min(places) :]).removeprefix("the ")
    if not kind or not text or kind.count(" ") >= TYPE_WORDS:
        return None
    return SAME_TYPE.get(kind, kind), text


def _on_a_line(text: str) -> str:
    return " ".join(text.replace(";", ",").split())


def _listed(cell: str, record: Record) -> Any:
    """A cell of a table: JSON, or one entity a line."""
    if not cell.lstrip().startswith("["):
        return [line for line in LINE.split(cell) if line.strip() and plain(line) != NONE]
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        raise _fault(record, cell) from None


def _written(item: Any, record: Record) -> Entity:
    if isinstance(item, dict):
        kind, text = item.get("type"), item.get("text")
    elif isinstance(item, str):
        kind, _, text = (part.strip() for part in item.partition(":"))
    else:
        raise _fault(record, item)
    if not (isinstance(kind, str) and isinstance(text, str)) or len(parsed(rendered([(kind, text)]))) != 1:
        raise _fault(record, item)
    return kind, text


def _fault(record: Record, value: Any) -> DataError:
    shown = repr(value) if len(repr(value)) < 80 else f"{repr(value)[:77]}..."
    why = f"holds {shown}, which is not of the form of entities"
    return DataError(f"record {record['id']!r}, field 'entities'", why, FORM)


def _types(record: Record) -> Iterator[str]:
    return (kind for kind, _ in entities_of(record))


def _explained(kind: str) -> str:
    return f"{kind} ({MEANINGS[kind]})" if kind in MEANINGS else kind
