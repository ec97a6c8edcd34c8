"""Builds `records.jsonl` from the sentences of WordNet in which every name is known.

    python -m rollcast_envs.data.entities.build [wordnet-base.deb]

Owns the choice of sentences; `sentences.py` owns what is a name. The same package always gives the same bytes. What is
left out, and why, is told in SOURCE.md.
"""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rollcast_envs.data.building import Record, to_lines, without_leaks
from rollcast_envs.data.entities.sentences import Limits, Sentence, sentences
from rollcast_envs.data.wordnet import wordnet
from rollcast_envs.splits import position, split_of

HERE = Path(__file__).parent
QUOTAS = {"ORG": 700, "PER": 800, "LOC": 600, "none": 250}
"""How many sentences at most, by the first of these types that occurs in them."""
PER_NAME = 30
PER_MASK = 2
WORDS = range(4, 41)


def main() -> None:
    records = build(sentences(wordnet()))
    (HERE / "records.jsonl").write_text(to_lines(records), encoding="utf-8", newline="\n")
    print(f"{len(records)} records, {dict(Counter(split_of(record['group']) for record in records))}")
    print(Counter((split_of(r["group"]), e["type"]) for r in records for e in r["entities"]))


def build(found: Iterable[Sentence]) -> list[Record]:
    """The records, sorted by id."""
    limits = Limits(QUOTAS, PER_NAME, PER_MASK)
    fit = [sentence for sentence in found if is_fit(sentence)]
    chosen = [sentence for sentence in sorted(fit, key=_order) if limits.take(quota_of(sentence), sentence)]
    return without_leaks([_record(sentence) for sentence in chosen], lambda record: record["text"])


def is_fit(sentence: Sentence) -> bool:
    """Names of one split, and without names only where a capital letter could mislead."""
    has_capital = bool(sentence.others) and any(letter.isupper() for letter in sentence.text[1:])
    return len(sentence.text.split()) in WORDS and sentence.split is not None and (bool(sentence.names) or has_capital)


def quota_of(sentence: Sentence) -> str:
    """The rarest type in the sentence."""
    types = {name.type for name in sentence.names}
    return next((kind for kind in QUOTAS if kind in types), "none")


def _order(sentence: Sentence) -> int:
    return position(sentence.id)


def _record(sentence: Sentence) -> dict[str, Any]:
    distinct = dict.fromkeys((name.type, name.text) for name in sentence.names)
    return {
        "id": f"entities:{sentence.id}",
        "kind": sentence.form,
        "text": sentence.text,
        "entities": [{"type": kind, "text": text} for kind, text in distinct],
        "group": sentence.group,
        "source": f"wordnet/{sentence.source}",
    }


if __name__ == "__main__":
    main()
