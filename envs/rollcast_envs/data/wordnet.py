"""WordNet 3.0 for the build scripts: fetched as Debian's package, read as data.

Owns: the digest of the package, its container and the form of WordNet's files. Does not know what a data set takes
from it. Only build scripts use it; an environment never does.
"""

import hashlib
import io
import re
import subprocess
import sys
import tarfile
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

PACKAGE = "wordnet-base=1:3.0-37"
SHA256 = "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752"
NOTICE = "WordNet 3.0 Copyright 2006 by Princeton University. All rights reserved."

CATEGORIES = (
    "adj.all", "adj.pert", "adv.all", "noun.Tops", "noun.act", "noun.animal", "noun.artifact", "noun.attribute",
    "noun.body", "noun.cognition", "noun.communication", "noun.event", "noun.feeling", "noun.food", "noun.group",
    "noun.location", "noun.motive", "noun.object", "noun.person", "noun.phenomenon", "noun.plant", "noun.possession",
    "noun.process", "noun.quantity", "noun.relation", "noun.shape", "noun.state", "noun.substance", "noun.time",
    "verb.body", "verb.change", "verb.cognition", "verb.communication", "verb.competition", "verb.consumption",
    "verb.contact", "verb.creation", "verb.emotion", "verb.motion", "verb.perception", "verb.possession",
    "verb.social", "verb.stative", "verb.weather", "adj.ppl",
)  # fmt: skip
"""Names of WordNet's lexicographer files, by number."""


@dataclass(frozen=True)
class Synset:
    """One meaning: the words that have it, what it is, and how it is explained. Reader -> build scripts."""

    id: str
    """Part of speech and place in WordNet's file, such as `n:02084071`."""
    category: str
    """One of `CATEGORIES`, such as `noun.animal`."""
    words: tuple[str, ...]
    definition: str
    examples: tuple[str, ...]
    """Sentences and phrases that use one of `words`."""
    kinds: tuple[str, ...]
    """Ids of what it is a kind of (hypernyms)."""
    instance_of: tuple[str, ...]
    """Ids of what it is one of: `Paris` is one of the cities, no kind of city."""


def wordnet() -> list[Synset]:
    """All synsets, in the order of WordNet's files.

    From the package named on the command line, else from the one that `apt-get download` fetches; nothing is installed.
    """
    if sys.argv[1:]:
        return read_package(Path(sys.argv[1]).read_bytes())
    with TemporaryDirectory() as folder:
        subprocess.run(["apt-get", "download", "--quiet=2", PACKAGE], cwd=folder, check=True)
        (package,) = Path(folder).glob("*.deb")
        return read_package(package.read_bytes())


def read_package(package: bytes) -> list[Synset]:
    digest = hashlib.sha256(package).hexdigest()
    if digest != SHA256:
        raise SystemExit(f"the package has sha256 {digest}, expected {SHA256}: check where it was fetched from")
    with tarfile.open(fileobj=io.BytesIO(archive_member(package, "data.tar.xz")), mode="r:xz") as archive:
        files = [archive.extractfile(f"./usr/share/wordnet/data.{part}") for part in ("noun", "verb", "adj", "adv")]
        texts = [file.read().decode() for file in files if file is not None]
    return [read_synset(line) for text in texts for line in text.splitlines() if not line.startswith("  ")]


def archive_member(package: bytes, wanted: str) -> bytes:
    """One file of a Debian package, which is a Unix archive: after eight bytes, heads of 60 bytes and their files."""
    start = 8
    while start < len(package):
        name, size = package[start : start + 16].decode().rstrip(" /"), int(package[start + 48 : start + 58])
        start += 60
        if name == wanted:
            return package[start : start + size]
        start += size + size % 2
    raise SystemExit(f"the package holds no {wanted}: it is none of Debian's")


def read_synset(line: str) -> Synset:
    """A line of a data file, as the manual page wndb(5) describes it."""
    fields, gloss = line.split(" | ", 1)
    offset, category, part, count, *rest = fields.split()
    words = rest[: 2 * int(count, 16) : 2]
    pointers = rest[2 * int(count, 16) + 1 :]
    found = list(zip(pointers[::4], pointers[1::4], pointers[2::4], strict=False))
    definition, examples = read_gloss(gloss)
    return Synset(
        id=f"{part}:{offset}",
        category=CATEGORIES[int(category)],
        words=tuple(re.sub(r"\((a|p|ip)\)$", "", word).replace("_", " ") for word in words),
        definition=definition,
        examples=examples,
        kinds=tuple(f"{of}:{at}" for symbol, at, of in found if symbol == "@"),
        instance_of=tuple(f"{of}:{at}" for symbol, at, of in found if symbol == "@i"),
    )


def read_gloss(gloss: str) -> tuple[str, tuple[str, ...]]:
    r"""The definition, and the examples that stand in quotes after it; without those that quote a writer by name.

    >>> read_gloss('a domestic animal; "the dog barked"; "he kept dogs" ')
    ('a domestic animal', ('the dog barked', 'he kept dogs'))
    >>> read_gloss('extreme; "their furious haste"; "a dog of war"- Shakespeare')
    ('extreme', ('their furious haste',))
    """
    text = unicodedata.normalize("NFC", " ".join(gloss.replace("`", "'").split()))
    definition = text.split('"')[0].rstrip("; ,:")
    examples = re.findall(r'"([^"]+)"(?!\s*[,-]*\s*[A-Z-])', text)
    return definition, tuple(example.strip(" ;") for example in examples)
