"""The Grafana dashboard shows figures that exist."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import ray

from deployment import DEPLOY, ROOT
from rollcast.telemetry import EXPORTED_PREFIX, series

DASHBOARD: dict[str, Any] = json.loads(
    (DEPLOY / "grafana" / "dashboards" / "rollcast.json").read_text(encoding="utf-8")
)
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
METRIC = re.compile(r"\bray_[a-z0-9_]+")
LABEL = re.compile(r"{{(\w+)}}")
# What the issue asks for, by a word of a metric's name.
ASKED_FOR = ("reward_mean", "eval", "kl_", "staleness", "fleet_workers", "busy_learner", "busy_rollout")
ASKED_FOR += ("samples_per_second", "sync_", "ledger_groups", "serve_deployment_request")


def ours() -> dict[str, tuple[str, ...]]:
    """Every series that docs/files.md leads to, with its labels."""
    section = (ROOT / "docs" / "files.md").read_text(encoding="utf-8").partition("## `metrics.jsonl`")[2]
    rows = [line.split("|")[1] for line in section.partition("\n## ")[0].splitlines() if line.startswith("| `")]
    found = [series(key) for cell in rows for key in re.findall(r"`([^`]+)`", cell)]
    return {EXPORTED_PREFIX + name: ("run", *labels) for name, labels in found}


def rays() -> str:
    """The names that Ray's own dashboards use."""
    folder = Path(ray.__file__).parent / "dashboard" / "modules" / "metrics" / "dashboards"
    return "\n".join(path.read_text(encoding="utf-8") for path in folder.glob("*.py"))


def queries() -> list[Any]:
    found = [(panel["title"], target) for panel in PANELS for target in panel["targets"]]
    return [pytest.param(target, id=f"{title} {target['refId']}") for title, target in found]


@pytest.mark.parametrize("target", queries())
def test_the_figure_exists(target: dict[str, Any]) -> None:
    names = METRIC.findall(target["expr"])
    assert names
    for name in names:
        if name.startswith(f"{EXPORTED_PREFIX}rollcast_"):
            assert set(LABEL.findall(target["legendFormat"])) <= set(ours()[name])
            assert f'{name}{{run=~"$run"}}' in target["expr"]
        else:
            assert re.search(rf"\b{name}\b", rays()), name


def test_everything_asked_for_is_shown() -> None:
    shown = " ".join(target["expr"] for panel in PANELS for target in panel["targets"])
    assert [word for word in ASKED_FOR if word not in shown] == []


def test_panels_neither_overlap_nor_share_an_id() -> None:
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells


def test_each_panel_says_what_it_shows() -> None:
    assert [panel["title"] for panel in PANELS if not panel["description"].endswith(".")] == []
