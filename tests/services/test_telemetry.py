"""Names of figures for Prometheus: valid, stable, and documented. tests/e2e/test_deployment.py sees them arrive."""

import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from rollcast.metrics import MetricsWriter, read
from rollcast.telemetry import EXPORTED_PREFIX, Series, series

ROOT = Path(__file__).parents[2]
NAME = re.compile(r"^[a-zA-Z_][a-zA-Z0-9_]*$")


def documented_keys() -> list[str]:
    """Keys of `metrics.jsonl` as docs/files.md lists them, placeholders and all."""
    section = (ROOT / "docs" / "files.md").read_text(encoding="utf-8").partition("## `metrics.jsonl`")[2]
    rows = [line.split("|")[1] for line in section.partition("\n## ")[0].splitlines() if line.startswith("| `")]
    return [key for cell in rows for key in re.findall(r"`([^`]+)`", cell)]


@pytest.mark.parametrize(
    ("key", "found"),
    [
        ("reward/mean", Series("rollcast_reward_mean", {})),
        ("samples_per_s", Series("rollcast_samples_per_second", {})),
        ("sync/load_s", Series("rollcast_sync_load_seconds", {})),
        ("eval/QA-v0/sampled_f1", Series("rollcast_eval", {"env": "QA-v0", "metric": "sampled_f1"})),
        ("eval/QA-v0/pass@4_f1", Series("rollcast_eval", {"env": "QA-v0", "metric": "pass@4_f1"})),
        ("eval/loss", Series("rollcast_eval_loss", {})),
        (
            "eval_kind/QA-v0/capital/f1",
            Series("rollcast_eval_kind", {"env": "QA-v0", "kind": "capital", "metric": "f1"}),
        ),
        ("eval/QA-v0/of/parts", Series("rollcast_eval", {"env": "QA-v0", "metric": "of/parts"})),
        ("reward_s/judge/max", Series("rollcast_reward_function_seconds", {"function": "judge", "stat": "max"})),
        ("ledger/done", Series("rollcast_ledger_groups", {"state": "done"})),
        ("time/wait_for_rollouts_s", Series("rollcast_stage_seconds", {"stage": "wait_for_rollouts"})),
        ("time", Series("rollcast_time_seconds", {})),
        ("odd-key.s", Series("rollcast_odd_key_s", {})),
    ],
)
def test_names_stay(key: str, found: Series) -> None:
    assert series(key) == found


def test_every_documented_figure_has_a_valid_series_of_its_own() -> None:
    keys = documented_keys()
    assert len(keys) > 50
    found = [series(re.sub(r"<(\w+)>", r"\1", key)) for key in keys]
    assert all(NAME.match(name) and all(NAME.match(label) for label in labels) for name, labels in found)
    assert len({(name, *labels.values()) for name, labels in found}) == len(keys)


def test_a_name_has_the_same_labels_for_every_key() -> None:
    labels: dict[str, set[tuple[str, ...]]] = {}
    for key in documented_keys():
        name, of_key = series(key)
        labels.setdefault(name, set()).add(tuple(of_key))
    assert {name for name, sets in labels.items() if len(sets) > 1} == set()


def test_the_documented_table_is_what_the_rule_gives() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| `([^`]+)` \| `([a-z_]+)\{([^}]*)\}` \|$", page, re.MULTILINE)
    assert len(table) == 15
    for key, name, labels in table:
        found = series(key)
        assert (EXPORTED_PREFIX + found.name, ["run", *found.labels]) == (name, labels.split(", "))


def test_the_writer_publishes_the_row_it_wrote(tmp_path: Path) -> None:
    published: list[Mapping[str, float]] = []
    MetricsWriter(tmp_path / "metrics.jsonl", None, published.append).write(3, {"reward/mean": 0.5, "x": float("nan")})
    assert published == read(tmp_path / "metrics.jsonl")
    assert set(published[0]) == {"step", "time", "reward/mean"}
