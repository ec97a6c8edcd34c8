"""The script that builds the facts, on a small sample of GeoNames' records; no network."""

import hashlib
import json
from collections import Counter
from importlib.resources import files
from random import Random
from typing import Any

import pytest

from rollcast_envs.data.geography import KINDS, load_facts
from rollcast_envs.data.geography.build import WHEEL_SHA256, build_facts, spellings, to_lines
from rollcast_envs.splits import SPLITS, split_of

CORRECTIONS: dict[str, Any] = json.loads((files("rollcast_envs.data.geography") / "corrections.json").read_text())
CONTINENTS = {"EU": "Europe", "SA": "South America", "NA": "North America", "AS": "Asia"}


def country(code: str, name: str, capital: str, continent: str, currency: tuple[str, str]) -> dict[str, Any]:
    return {
        "iso": code,
        "name": name,
        "capital": capital,
        "continentcode": continent,
        "currencycode": currency[0],
        "currencyname": currency[1],
        "geonameid": sum(code.encode()),
    }


def city(number: int, name: str, code: str, people: int, at: tuple[float, float], *other: str) -> dict[str, Any]:
    return {
        "geonameid": number,
        "name": name,
        "countrycode": code,
        "population": people,
        "latitude": at[0],
        "longitude": at[1],
        "admin1code": "11" if name == "Sevastopol" else "01",
        "alternatenames": list(other),
    }


COUNTRIES = [
    country("FR", "France", "Paris", "EU", ("EUR", "Euro")),
    country("NL", "The Netherlands", "Amsterdam", "EU", ("EUR", "Euro")),
    country("BR", "Brazil", "Brasilia", "SA", ("BRL", "Real")),
    country("US", "United States", "Washington", "NA", ("USD", "Dollar")),
    country("MC", "Monaco", "Monaco", "EU", ("EUR", "Euro")),
    country("UA", "Ukraine", "Kyiv", "EU", ("UAH", "Hryvnia")),
    country("TW", "Taiwan", "Taipei", "AS", ("TWD", "Dollar")),
]
CITIES = [
    city(1, "Paris", "FR", 2_100_000, (48.85, 2.35)),
    city(2, "Paris", "US", 25_000, (33.66, -95.55)),
    city(3, "Brasília", "BR", 2_200_000, (-15.78, -47.93)),
    city(4, "New York City", "US", 8_000_000, (40.71, -74.0)),
    city(5, "Brooklyn", "US", 2_500_000, (40.65, -73.95)),
    city(6, "Valence", "FR", 300_000, (44.9, 4.9)),
    city(7, "Valence", "BR", 200_000, (-10.0, -45.0)),
    city(8, "Fort-de-Bois", "FR", 100_000, (45.0, 1.0)),
    city(9, "Sevastopol", "UA", 400_000, (44.6, 33.5)),
    city(10, "Kiyev", "UA", 2_900_000, (50.45, 30.52), "Kyiv", "Київ"),
    city(11, "Taipei", "TW", 7_800_000, (25.0, 121.5)),
    city(12, "Brazil City", "BR", 900_000, (-20.0, -45.0)),
]


def sample(seed: int | None = None) -> dict[str, Any]:
    countries, cities = list(COUNTRIES), list(CITIES)
    if seed is not None:
        Random(seed).shuffle(countries)
        Random(seed).shuffle(cities)
    return {fact.id: fact for fact in build_facts(countries, cities, CONTINENTS, CORRECTIONS)}


def test_the_same_records_give_the_same_bytes_in_any_order() -> None:
    lines = to_lines(sample().values())
    assert lines == to_lines(sample(1).values()) == to_lines(sample(2).values())
    assert [json.loads(line)["id"] for line in lines.splitlines()] == sorted(sample())


def test_the_shipped_file_is_what_the_script_writes_from_its_own_facts() -> None:
    text = (files("rollcast_envs.data.geography") / "facts.jsonl").read_text(encoding="utf-8")
    assert to_lines(load_facts()) == text


def test_the_provenance_file_tells_the_digests_and_counts_of_what_is_shipped() -> None:
    folder = files("rollcast_envs.data.geography")
    told = (folder / "SOURCE.md").read_text(encoding="utf-8")
    digest = hashlib.sha256((folder / "facts.jsonl").read_bytes()).hexdigest()
    assert digest in told and WHEEL_SHA256 in told and "CC BY 4.0" in told
    for kind in KINDS:
        facts = [fact for fact in load_facts() if fact.kind == kind]
        splits = Counter(split_of(fact.group) for fact in facts)
        figures = " | ".join(str(number) for number in (len(facts), *(splits[split] for split in SPLITS)))
        assert f" | {figures} | " in told


def test_only_fair_cities_are_asked_for() -> None:
    subjects = {fact.subject for fact in sample().values() if fact.kind == "country"}
    assert subjects == {"Paris", "Brasília", "New York City", "Fort-de-Bois", "Kiyev"}


def test_capitals_share_the_group_of_their_country_and_other_cities_have_their_own() -> None:
    facts = sample()
    groups = {facts[f"country:{number}"].group for number in (1, 3, 10)}
    assert groups == {"country:FR", "country:BR", "country:UA"}
    assert facts["country:8"].group == "city:8"


def test_names_are_those_that_people_write() -> None:
    facts = sample()
    assert facts["capital:NL"].subject == "the Netherlands"
    assert facts["capital:BR"].references == ("Brasilia", "Brasília")
    assert facts["country:4"].references[:2] == ("United States", "United States of America")
    assert "capital:MC" not in facts and "capital:TW" not in facts
    assert facts["currency:US"].source == f"geonames/{sum(b'US')}"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Paris", ["Paris"]),
        ("Łódź", ["Łódź", "Lodz"]),
        ("Porto-Novo", ["Porto-Novo", "Porto Novo"]),
        ("St. John’s", ["St. John's", "Saint John's"]),
    ],
)
def test_spellings(name: str, expected: list[str]) -> None:
    assert spellings([name]) == expected
