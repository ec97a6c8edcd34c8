"""Builds `records.jsonl` from the rated tweets in VADER's source distribution.

    python -m rollcast_envs.data.sentiment.build

Owns the choice of texts and the labels. The archive is fetched with pip, which runs its `setup.py` for the metadata,
checked against its digest, and read as data: nothing of it is imported. The same archive always gives the same bytes.
What is left out, and why, is told in SOURCE.md.
"""

import hashlib
import html
import io
import re
import tarfile
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from rollcast_envs.data.building import Record, download, to_lines, without_leaks
from rollcast_envs.splits import SPLITS, Split, position, split_of

HERE = Path(__file__).parent
REQUIREMENT = "vaderSentiment==3.3.2"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
TWEETS = "hutto_ICWSM_2014/tweets_GroundTruth.txt"

CLEAR = 1.0
"""How far the mean rating, from -4 to 4, is from neutral at least."""
REMOVED = re.compile(r"https?://url_removed|\[(?:link|url|\d+ comments)\]", re.IGNORECASE)
"""What VADER's authors put in the place of addresses; the writers they call @anonymous."""
ADDRESS = re.compile(r"@(?!anonymous\b)\w|https?:|www\.|\ufffd", re.IGNORECASE)
SLUR = re.compile(r"\b(?:nigg|fag|retard|cunt)", re.IGNORECASE)


def main() -> None:
    with TemporaryDirectory() as folder:
        flags = ("--no-binary", ":all:", "--no-build-isolation")
        records = build(read_ratings(download(Path(folder), REQUIREMENT, SHA256, *flags)))
    (HERE / "records.jsonl").write_text(to_lines(records), encoding="utf-8", newline="\n")
    print(f"{len(records)} records, {Counter((split_of(r['group']), r['label']) for r in records)}")


def read_ratings(archive: Path) -> Iterator[tuple[str, float, str]]:
    """Number, mean rating from -4 to 4, and text of each tweet."""
    with tarfile.open(archive) as outer:
        packed = outer.extractfile(INNER)
        if packed is None:
            raise SystemExit(f"{archive.name} holds no {INNER}")
        with tarfile.open(fileobj=io.BytesIO(packed.read())) as inner:
            file = inner.extractfile(TWEETS)
            lines = [] if file is None else file.read().decode("utf-8-sig").splitlines()
    for line in lines:
        number, rating, text = line.split("\t", 2)
        yield number, float(rating), text


def build(ratings: Iterable[tuple[str, float, str]]) -> list[Record]:
    """The records, sorted by id, as many positive as negative ones in each split."""
    by_text: dict[str, Record] = {}
    for number, rating, raw in ratings:
        text = tidy(raw)
        if abs(rating) >= CLEAR and is_fit(text):
            by_text.setdefault(text.casefold(), _record(number, rating, text))
    return balanced(without_leaks(list(by_text.values()), lambda record: record["text"]))


def is_fit(text: str) -> bool:
    return len(text.split()) > 1 and ADDRESS.search(text) is None and SLUR.search(text) is None


def tidy(text: str) -> str:
    """Composed characters, no HTML entities, no removed addresses, and any run of white space as one blank."""
    return " ".join(REMOVED.sub(" ", unicodedata.normalize("NFC", html.unescape(html.unescape(text)))).split())


def balanced(records: Iterable[Record]) -> list[Record]:
    """Of each split the same number for each label."""
    groups: dict[tuple[Split, str], list[Record]] = defaultdict(list)
    for record in sorted(records, key=lambda record: position(record["id"])):
        groups[split_of(record["group"]), record["label"]].append(record)
    size = {split: min(len(found) for (of, _), found in groups.items() if of == split) for split in SPLITS}
    kept = (record for (split, _), found in groups.items() for record in found[: size[split]])
    return sorted(kept, key=lambda record: str(record["id"]))


def _record(number: str, rating: float, text: str) -> Record:
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return {
        "id": f"sentiment:{digest}",
        "text": text,
        "label": "positive" if rating > 0 else "negative",
        "rating": round(rating, 2),
        "group": f"text:{digest}",
        "source": f"vader/tweets/{number}",
    }


if __name__ == "__main__":
    main()
