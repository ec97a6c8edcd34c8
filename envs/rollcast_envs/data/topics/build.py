"""Builds `records.jsonl` from the definitions of WordNet.

    python -m rollcast_envs.data.topics.build [wordnet-base.deb]

Owns the choice of definitions and the labels. The same package always gives the same bytes. What is left out, and why,
is told in SOURCE.md.
"""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

from rollcast_envs.data.building import Record, to_lines, without_leaks
from rollcast_envs.data.wordnet import Synset, wordnet
from rollcast_envs.splits import SPLITS, Split, position, split_of

HERE = Path(__file__).parent
LABELS = {
    "noun.animal": "animal",
    "noun.artifact": "artifact",
    "noun.body": "body",
    "noun.food": "food",
    "noun.location": "place",
    "noun.person": "person",
    "noun.plant": "plant",
}
"""Label by WordNet's category. Others overlap even for a careful reader: a substance may be food or made."""
TELLTALE = re.compile(
    r"\b(animals?|artifacts?|body|bodies|bodily|foods?|foodstuffs?|places?|persons?|people|plants?|genus)\b"
    r"|--",
    re.IGNORECASE,
)
"""Definitions that say a label are left out, as are those that only name a genus."""
WORDS = range(6, 31)
CANDIDATES = 430
"""How many definitions of each label at most."""


def main() -> None:
    records = build(wordnet())
    (HERE / "records.jsonl").write_text(to_lines(records), encoding="utf-8", newline="\n")
    print(f"{len(records)} records, {Counter((split_of(r['group']), r['label']) for r in records)}")


def build(synsets: Iterable[Synset]) -> list[Record]:
    """The records, sorted by id, as many of each label in each split."""
    by_text: dict[str, list[Synset]] = defaultdict(list)
    for synset in synsets:
        by_text[synset.definition].append(synset)
    fit = [found[0] for found in by_text.values() if len(found) == 1 and is_fit(found[0])]
    candidates: list[Record] = []
    for category in LABELS:
        records = [_record(synset) for synset in fit if synset.category == category]
        candidates += sorted(records, key=_order)[:CANDIDATES]
    return balanced(without_leaks(candidates, _text))


def is_fit(synset: Synset) -> bool:
    """One reader's guess: kinds of things, not single ones, explained in a sentence that does not say its label."""
    text = synset.definition
    return (
        synset.category in LABELS
        and not synset.instance_of
        and len(text.split()) in WORDS
        and text.count("(") == text.count(")")
        and TELLTALE.search(text) is None
    )


def balanced(records: Iterable[Record]) -> list[Record]:
    """Of each split the same number for each label."""
    groups: dict[tuple[Split, str], list[Record]] = defaultdict(list)
    for record in sorted(records, key=_order):
        groups[split_of(record["group"]), record["label"]].append(record)
    size = {split: min(len(found) for (of, _), found in groups.items() if of == split) for split in SPLITS}
    return sorted((record for (split, _), found in groups.items() for record in found[: size[split]]), key=_id)


def _record(synset: Synset) -> Record:
    identifier = hashlib.sha256(synset.definition.encode()).hexdigest()[:12]
    return {
        "id": f"topics:{identifier}",
        "text": synset.definition,
        "label": LABELS[synset.category],
        "group": f"synset:{synset.id}",
        "source": f"wordnet/{synset.id}",
    }


def _id(record: Record) -> str:
    return str(record["id"])


def _order(record: Record) -> int:
    return position(_id(record))


def _text(record: Record) -> str:
    return str(record["text"])


if __name__ == "__main__":
    main()
