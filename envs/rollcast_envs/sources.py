"""What `data` names: a file by its suffix, or a Hugging Face data set.

Owns: telling them apart, and what to say when there is nothing of that name. Does not know what is in them.
"""

import re
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from os import stat_result
from os.path import abspath
from pathlib import Path

from rollcast_envs.columnar import Parquet, hub_dataset
from rollcast_envs.documents import Json
from rollcast_envs.errors import DataError
from rollcast_envs.fields import listed, nearest
from rollcast_envs.formats import Csv, JsonLines, Source, Tsv
from rollcast_envs.splits import SPLITS, Split

READERS: Mapping[str, Callable[[Path], Source]] = {
    ".jsonl": JsonLines,
    ".ndjson": JsonLines,
    ".json": Json,
    ".csv": Csv,
    ".tsv": Tsv,
    ".parquet": Parquet,
}
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?(:[\w.-]+)?")
OTHER_NAMES: Mapping[str, Split] = {"dev": "validation", "val": "validation"}


@dataclass(frozen=True)
class Located:
    """A source that is there but not yet open. `data` -> index."""

    key: str
    """The same for the same source."""
    stamp: tuple[int, ...]
    """Another one when a file was changed."""
    own: bool
    """Whether all its rows are of the split asked for."""
    open: Callable[[], Source]


def split_named(name: str) -> Split | None:
    """A split by its name or by one of its other names, `dev` and `val`; None if it is none."""
    name = name.strip().lower()
    return next((split for split in SPLITS if split == OTHER_NAMES.get(name, name)), None)


def locate(data: str | Mapping[str, str], split: Split) -> Located:
    """The source that holds `split`, if `data` is a mapping that of the split. Raises `DataError`."""
    if not isinstance(data, Mapping):
        return _located(str(data), split, own=False)
    given = {_known_split(name): source for name, source in data.items()}
    return _located(str(_of_split(given, split, f"data = {dict(data)!r}")), split, own=True)


def _known_split(name: str) -> Split:
    if found := split_named(name):
        return found
    fix = f"name the splits {', '.join(SPLITS)}"
    raise DataError(f"data names a split {name!r}", "there is no such split", fix)


def _of_split(given: Mapping[Split, str], split: Split, what: str) -> str:
    if split in given:
        return given[split]
    fix = f'use a split that is there, or give a source for each, as data = {{"train": ..., "{split}": ...}}'
    raise DataError(what, f"has no split {split!r}; it has {listed(list(given))}", fix)


def _located(name: str, split: Split, own: bool) -> Located:
    path = Path(name).expanduser()
    status = _status(path)
    if status is not None:
        return Located(abspath(path), _stamp(status), own, partial(_open, path, _reader(path, status)))
    if path.suffix.lower() not in READERS and HUB_NAME.fullmatch(name):
        return _on_the_hub(name, split, own)
    raise DataError(f"data = {name!r}", "there is no such file", _where_else(path))


def _status(path: Path) -> stat_result | None:
    try:
        return path.stat()
    except (OSError, ValueError):
        return None


def _stamp(status: stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _reader(path: Path, status: stat_result) -> Callable[[Path], Source]:
    if not stat.S_ISREG(status.st_mode):
        kind = "is a folder" if stat.S_ISDIR(status.st_mode) else "is no regular file"
        raise DataError(f"data = {str(path)!r}", kind, f"name one file in it{_examples(path)}")
    if path.suffix.lower() not in READERS:
        why = f"ends in {path.suffix!r}, so its format is not known"
        raise DataError(str(path), why, f"give it in one of the formats {', '.join(READERS)}, with that ending")
    if not status.st_size:
        raise DataError(str(path), "is empty", "put at least one row into it")
    return READERS[path.suffix.lower()]


def _open(path: Path, reader: Callable[[Path], Source]) -> Source:
    try:
        return reader(path)
    except OSError as error:
        raise DataError(str(path), f"cannot be opened ({error.strerror})", "check its permissions") from None


def _on_the_hub(name: str, split: Split, own: bool) -> Located:
    """With several splits the one asked for; a sole split is split like a file, whatever its name."""
    found = hub_dataset(name)
    if len(found) == 1:
        (sole,) = found.values()
        return Located(sole.name, (), own, lambda: sole)
    given = {known: name for name in found if (known := split_named(name))}
    chosen = found[_of_split(given, split, f"the Hugging Face data set {name!r} ({listed(list(found))})")]
    return Located(chosen.name, (), True, lambda: chosen)


def _where_else(path: Path) -> str:
    if not path.parent.is_dir():
        return f"check the path: the folder {str(path.parent)!r} does not exist either"
    guess = nearest(path.name, _names(path.parent))
    return f"did you mean {guess!r} in {str(path.parent)!r}?" if guess else "check the path" + _examples(path.parent)


def _examples(folder: Path) -> str:
    files = sorted(name for name in _names(folder) if Path(name).suffix.lower() in READERS)
    return f"; {str(folder)!r} has {listed(files)}" if files else ""


def _names(folder: Path) -> Iterable[str]:
    try:
        return [path.name for path in folder.iterdir()]
    except OSError:
        return []
