"""The script that builds the translations, on small samples of its sources, and the files it built; no network."""

import hashlib
import io
import json
import unicodedata
import zipfile
from collections import Counter
from functools import cache
from importlib.resources import files
from typing import Any

import pytest

from rollcast_envs.data.building import ALIKE, likeness, to_lines
from rollcast_envs.data.translation import LANGUAGES
from rollcast_envs.data.translation.build import (
    WHEELS,
    Pair,
    build,
    catalogue_pairs,
    component_pairs,
    corresponds,
    in_register,
    is_sentence,
    po_entries,
)
from rollcast_envs.splits import split_of

CATALOGUE = r"""# Spanish translations.
msgid ""
msgstr ""
"Language: es\n"

#: indico/modules/events/papers/forms.py:28 indico/core/errors.py:3
msgid "This paper has not been "
"judged yet."
msgstr "Este artículo no "
"ha sido evaluado."

#. Seen while the page loads.
#: indico/core/errors.py:30
#, python-format
msgctxt "page"
msgid "The \"main\" page\tdoes not exist."
msgstr "La página \"principal\" no existe."

#, fuzzy
msgid "The old text of an entry."
msgstr "Otro texto de una entrada."

msgid "%d file was removed."
msgid_plural "%d files were removed."
msgstr[0] "Se eliminó %d archivo."
msgstr[1] "Se eliminaron %d archivos."

msgid "Nobody has translated this."
msgstr ""

#~ msgid "This text is not used."
#~ msgstr "Este texto no se usa."
"""
SIREN = {
    "en": {
        "title": "Siren",
        "services": {"on": {"description": "Turns the siren on."}, "time": {"description": "Waits {time} seconds."}},
        "step": {
            "acme": "The address of your Acme device.",
            "other": "The address of your Other Maker 2 device.",
            "en_only": "This text is only English.",
        },
    },
    "es": {
        "title": "Sirena",
        "services": {"on": {"description": "Enciende la sirena."}, "time": {"description": "Espera {time} segundos."}},
        "step": {
            "acme": "La dirección de tu dispositivo Acme.",
            "other": "La dirección de tu dispositivo Other Maker 2.",
        },
    },
    "fr": {"services": {"on": {"description": "Allume la sirène."}}},
}


def archive(members: dict[str, str]) -> zipfile.ZipFile:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as written:
        for name, text in members.items():
            written.writestr(name, text)
    return zipfile.ZipFile(packed)


def home_assistant() -> zipfile.ZipFile:
    folder = "homeassistant/components/siren/translations"
    return archive({f"{folder}/{language}.json": json.dumps(tree) for language, tree in SIREN.items()})


def pair(english: str, translation: str, language: str = "es", source: str = "homeassistant/siren") -> Pair:
    return Pair(language, source, source, english, translation)


@cache
def committed(language: str) -> list[dict[str, Any]]:
    text = (files("rollcast_envs.data.translation") / f"{language}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def texts(language: str, split: str, side: str) -> list[str]:
    return [record[side] for record in committed(language) if split_of(record["group"]) == split]


def test_a_catalogue_gives_its_translated_entries_only() -> None:
    assert list(po_entries(CATALOGUE)) == [
        (
            "indico/modules/events/papers/forms.py",
            "This paper has not been judged yet.",
            "Este artículo no ha sido evaluado.",
        ),
        ("indico/core/errors.py", 'The "main" page\tdoes not exist.', 'La página "principal" no existe.'),
    ]


def test_a_catalogue_without_file_names_belongs_to_its_application() -> None:
    entry = 'msgid "Enter a whole number."\nmsgstr "{}"\n'
    found = catalogue_pairs(
        archive(
            {
                "django/forms/locale/fr/LC_MESSAGES/django.po": entry.format("Saisissez un nombre entier."),
                "django/forms/locale/fr_CA/LC_MESSAGES/django.mo": "",
                "django/forms/locale/nl/LC_MESSAGES/django.po": entry.format("Voer een geheel getal in."),
            }
        )
    )
    assert list(found) == [
        Pair("fr", "django/forms", "django/forms", "Enter a whole number.", "Saisissez un nombre entier.")
    ]


def test_a_sample_of_both_sources_gives_the_expected_records() -> None:
    indico = archive({"indico/translations/es_ES/LC_MESSAGES/messages.po": CATALOGUE})
    found = build([*component_pairs(home_assistant()), *catalogue_pairs(indico)])
    spanish = {record["en"]: record for record in found["es"]}
    assert set(spanish) == {
        "Turns the siren on.",
        "The address of your Acme device.",
        "This paper has not been judged yet.",
    }
    assert list(spanish["Turns the siren on."].items()) == [
        ("id", "translation:es:c56d5a7ba774"),
        ("group", "homeassistant/siren"),
        ("source", "homeassistant/siren"),
        ("en", "Turns the siren on."),
        ("es", "Enciende la sirena."),
    ]
    paper = spanish["This paper has not been judged yet."]
    assert (paper["group"], paper["source"]) == (
        "indico/modules/events/papers",
        "indico/modules/events/papers/forms.py",
    )
    assert [record["fr"] for record in found["fr"]] == ["Allume la sirène."]
    assert found["de"] == []


def test_the_order_of_the_pairs_does_not_matter() -> None:
    pairs = list(component_pairs(home_assistant()))
    assert to_lines(build(pairs)["es"]) == to_lines(build(reversed(pairs))["es"])


def test_a_sentence_that_several_components_have_is_kept_where_most_languages_have_it() -> None:
    english = "Opens the garage door."
    found = build(
        [
            pair(english, "Abre el garaje.", source="homeassistant/a"),
            pair(english, "Abre la puerta del garaje.", source="homeassistant/b"),
            pair(english, "Ouvre la porte du garage.", "fr", source="homeassistant/b"),
        ]
    )
    assert [record["source"] for record in [*found["es"], *found["fr"]]] == ["homeassistant/b"] * 2


@pytest.mark.parametrize(
    "text",
    [
        "The device was found. Try again.",
        "turns the siren on.",
        "Turns the siren on",
        "Set the value of max_time.",
        "Name of the device (optional).",
        "See the page at https://example.org now.",
        "Waits {time} seconds here.",
        "Enter the code 123456 now.",
        "Loading the page now...",
    ],
)
def test_what_is_not_one_plain_sentence_is_left_out(text: str) -> None:
    assert not is_sentence(text)


def test_a_translation_has_the_numbers_the_question_and_about_the_length_of_the_english() -> None:
    assert corresponds("Choose 1 of 2 devices.", "Elige 1 de 2 dispositivos.")
    assert not corresponds("Choose 1 of 3 devices.", "Elige 1 de 2 dispositivos.")
    assert not corresponds("Is the device ready?", "El dispositivo está listo.")
    assert not corresponds("You are not allowed to see this page.", "Sin acceso.")
    assert not corresponds("Choose a device.", "Choose a device.")


@pytest.mark.parametrize(
    ("english", "kept", "dropped", "language"),
    [
        ("Enter your password.", "Gib dein Passwort ein.", "Geben Sie Ihr Passwort ein.", "de"),
        ("Enter your password.", "Saisissez votre mot de passe.", "Saisis ton mot de passe.", "fr"),
        ("Enter your password.", "Introduce tu contraseña.", "Introduzca la contraseña.", "es"),
        ("The name of your device.", "El nombre de tu dispositivo.", "El nombre de su dispositivo.", "es"),
    ],
)
def test_each_language_addresses_the_reader_in_one_way(english: str, kept: str, dropped: str, language: str) -> None:
    assert in_register(pair(english, kept, language))
    assert not in_register(pair(english, dropped, language))


def test_programs_that_say_usted_give_only_spanish_that_addresses_nobody() -> None:
    assert in_register(pair("The page does not exist.", "La página no existe.", source="indico/core"))
    assert not in_register(pair("You cannot see the page.", "No puede ver la página.", source="indico/core"))


@pytest.mark.parametrize("language", LANGUAGES)
def test_committed_records_are_well_formed(language: str) -> None:
    records = committed(language)
    assert len(records) >= 1_500
    assert len({record["id"] for record in records}) == len(records) == len({record["en"] for record in records})
    assert [record["id"] for record in records] == sorted(record["id"] for record in records)
    for record in records:
        assert list(record) == ["id", "group", "source", "en", language]
        assert record["id"].startswith(f"translation:{language}:")
        assert record["source"].startswith(record["group"])
        assert all(unicodedata.is_normalized("NFC", value) for value in record.values())
        assert is_sentence(record["en"]) and is_sentence(record[language])
        assert record["en"] != record[language]


def test_the_provenance_names_the_digests_of_the_wheels_and_of_the_files() -> None:
    folder = files("rollcast_envs.data.translation")
    told = (folder / "SOURCE.md").read_text(encoding="utf-8")
    assert all(sha256 in told for _, sha256 in WHEELS.values())
    for language in LANGUAGES:
        assert hashlib.sha256((folder / f"{language}.jsonl").read_bytes()).hexdigest() in told


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_split_is_sizeable(language: str) -> None:
    sizes = Counter(split_of(record["group"]) for record in committed(language))
    assert sizes["train"] >= 1_200
    assert min(sizes["validation"], sizes["test"]) >= 120


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_record_has_a_near_duplicate_in_another_split(language: str) -> None:
    for side in ("en", language):
        train, validation, test = (texts(language, split, side) for split in ("train", "validation", "test"))
        assert likeness(test, train).max() < ALIKE
        assert likeness(validation, [*train, *test]).max() < ALIKE


def test_training_on_one_language_shows_no_english_of_the_test_of_another() -> None:
    train = [text for language in LANGUAGES for text in texts(language, "train", "en")]
    test = [text for language in LANGUAGES for text in texts(language, "test", "en")]
    assert likeness(test, train).max() < ALIKE


def test_a_sentence_has_one_group_in_all_languages() -> None:
    groups: dict[str, set[str]] = {}
    for language in LANGUAGES:
        for record in committed(language):
            groups.setdefault(record["en"], set()).add(record["group"])
    assert {len(found) for found in groups.values()} == {1}
