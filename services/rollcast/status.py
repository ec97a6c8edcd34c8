"""`rollcast status` and `rollcast runs`: what a run is doing, told from its files alone.

Owns: one screen on a run and one line on each. Does not know the run's processes: it reads what they last wrote, so
that it works from any machine that sees the folder, and after the run has ended.
"""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.text import Text

from rollcast import metrics
from rollcast.display import grid, moment, table
from rollcast.rundir import RunDir
from rollcast.runs import State, owner_of, state_of, status_of, total_steps

STYLES: dict[State, str] = {"running": "green", "finished": "blue", "ended": "yellow", "unknown": "yellow"}


@dataclass(frozen=True)
class Figure:
    """A figure of the newest row that has it, and its change since the first: step 0 where it was measured then."""

    now: float
    step: int
    change: float
    since_step: int


@dataclass(frozen=True)
class RunLine:
    """One run among others."""

    name: str
    path: str
    state: State
    step: int
    total_steps: int | None
    reward: float | None
    started: float | None


@dataclass(frozen=True)
class RunStatus:
    """One run in full. What is not known is None or absent."""

    name: str
    path: str
    state: State
    host: str | None
    pid: int | None
    started: float | None
    heard_s: float | None
    """Seconds since its last word."""
    step: int
    total_steps: int | None
    policy_version: int | None
    waiting_for: str | None
    """What the trainer waits for, or was last waiting for."""
    buffered: int | None
    """Groups played and not yet trained on."""
    figures: dict[str, Figure]
    fleet: dict[str, int]
    ledger: dict[str, int]
    dropped: dict[str, int]
    staleness: dict[str, float]
    busy: dict[str, float]
    """Share of the time since the row before that each role worked."""
    seconds: dict[str, float]
    """Of the trainer by stage, over the whole run."""


def line_of(run: RunDir) -> RunLine:
    rows = metrics.read(run.metrics)
    rewards = [row["reward/mean"] for row in rows if "reward/mean" in row]
    return RunLine(
        name=run.path.name,
        path=str(run.path),
        state=state_of(run),
        step=_step(rows, status_of(run)),
        total_steps=total_steps(run),
        reward=rewards[-1] if rewards else None,
        started=owner_of(run).get("started"),
    )


def status(run: RunDir) -> RunStatus:
    owner, said, rows = owner_of(run), status_of(run), metrics.read(run.metrics)
    last = rows[-1] if rows else {}
    return RunStatus(
        name=run.path.name,
        path=str(run.path),
        state=state_of(run),
        host=owner.get("host"),
        pid=owner.get("pid"),
        started=owner.get("started"),
        heard_s=max(time.time() - said["time"], 0.0) if "time" in said else None,
        step=_step(rows, said),
        total_steps=total_steps(run),
        policy_version=_whole(said.get("version", last.get("policy_version"))),
        waiting_for=said.get("waiting_for"),
        buffered=said.get("buffered"),
        figures=_figures(rows),
        fleet=_counts("fleet/", last) | {name: int(said[name]) for name in FLEET_FACTS if name in said},
        ledger=_counts("ledger/", last) | {name: int(said[name]) for name in LEDGER_STATES if name in said},
        dropped=_counts("dropped/", last),
        staleness=_below("staleness/", _newest(rows, "staleness/mean")),
        busy=_below("busy/", _newest(rows, "busy/learner")),
        seconds=seconds_by_stage(rows),
    )


FLEET_FACTS = ("workers", "wanted", "draining")
LEDGER_STATES = ("pending", "leased", "done", "failed")


def seconds_by_stage(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of the trainer by stage over all rows, the longest first."""
    totals: dict[str, float] = defaultdict(float)
    for row in rows:
        for name, value in _below("time/", row).items():
            totals[name.removesuffix("_s").replace("_", " ")] += value
    return dict(sorted(totals.items(), key=lambda item: -item[1]))


def _step(rows: Sequence[Mapping[str, Any]], said: Mapping[str, Any]) -> int:
    return int(said.get("step", rows[-1]["step"] if rows else 0))


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def _below(prefix: str, row: Mapping[str, Any]) -> dict[str, float]:
    return {name.removeprefix(prefix): value for name, value in row.items() if name.startswith(prefix)}


def _counts(prefix: str, row: Mapping[str, Any]) -> dict[str, int]:
    return {name: int(value) for name, value in _below(prefix, row).items()}


def _newest(rows: Sequence[Mapping[str, Any]], key: str) -> Mapping[str, Any]:
    """The newest row that has the figure: step 0 and a row held for its evaluation lack some."""
    return next((row for row in reversed(rows) if key in row), {})


def _figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    names = {name: None for row in rows for name in row if name == "reward/mean" or name.startswith("eval/")}
    return {name: _figure(name, [row for row in rows if name in row]) for name in sorted(names, reverse=True)}


def _figure(name: str, rows: Sequence[Mapping[str, Any]]) -> Figure:
    first, last = rows[0], rows[-1]
    return Figure(last[name], last["step"], last[name] - first[name], first["step"])


# ---- the screen


def show(found: RunStatus, console: Console) -> None:
    console.print(Group(_headline(found), _activity(found), Text(), _details(found)))


def _headline(found: RunStatus) -> Text:
    text = Text(f"{found.name}  ", style="bold").append(found.state, style=STYLES[found.state])
    if found.host is not None:
        text.append(f" on {found.host}, process {found.pid}", style="not bold")
    if found.started is not None:
        text.append(f", started {moment(found.started)}", style="not bold")
    if found.heard_s is not None and found.state in ("running", "unknown"):
        text.append(f", heard {found.heard_s:,.0f} s ago", style="not bold dim")
    return text


def _activity(found: RunStatus) -> Text:
    steps = f"step {found.step} of {found.total_steps}" if found.total_steps is not None else f"step {found.step}"
    parts = [steps]
    if found.policy_version is not None:
        parts.append(f"policy version {found.policy_version}")
    if found.waiting_for is not None:
        verb = "waits" if found.state == "running" else "last waited"
        parts.append(f"the trainer {verb} for {found.waiting_for}")
    return Text("   ".join(parts))


def _details(found: RunStatus) -> RenderableType:
    lines = grid()
    for label, said in _lines(found):
        if said:
            lines.add_row(label, said)
    return lines


def _lines(found: RunStatus) -> Iterator[tuple[str, str]]:
    for name, figure in found.figures.items():
        yield name, f"{figure.now:.3f} at step {figure.step}{_change(figure)}"
    yield "fleet", _listed(found.fleet)
    buffered = {} if found.buffered is None else {"groups buffered": found.buffered}
    yield "ledger", _listed(found.ledger | buffered)
    yield "dropped", _listed(found.dropped)
    yield "staleness", ", ".join(f"{name} {value:.1f}" for name, value in found.staleness.items())
    yield "busy", ", ".join(f"{name} {value:.0%}" for name, value in found.busy.items())
    yield "seconds", ", ".join(f"{name} {value:,.1f}" for name, value in found.seconds.items())
    yield "folder", found.path


def _change(figure: Figure) -> str:
    return f" ({figure.change:+.3f} since step {figure.since_step})" if figure.step != figure.since_step else ""


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def show_all(lines: Sequence[RunLine], console: Console) -> None:
    shown = table(console, "run", "state", "step", "reward", "started", right=("step", "reward"))
    for line in lines:
        shown.add_row(
            line.name,
            Text(line.state, style=STYLES[line.state]),
            f"{line.step}/{'?' if line.total_steps is None else line.total_steps}",
            "" if line.reward is None else f"{line.reward:.3f}",
            "" if line.started is None else moment(line.started),
        )
    console.print(shown)
