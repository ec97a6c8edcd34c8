"""`rollcast rollouts`: what was played for a step, as a table or as lines of JSON, and what is played from now on.

Owns: choosing recorded episodes, and showing them whole. Does not know who recorded them (`records.py` has the schema),
nor how one is shown token by token (`token_view.py`, `token_page.py`).
"""

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from rollcast import records
from rollcast.display import harmless, table
from rollcast.errors import UsageError
from rollcast.rundir import RunDir
from rollcast.runs import state_of

Record = dict[str, Any]

SHOWN = 16
"""Rows of a table, unless told otherwise."""
SHOWN_BY_TOKEN = 2
"""Samples whose tokens are printed, unless told otherwise."""
POLL_S = 0.5
ASK_STATE_EVERY = 10
"""Polls between looks at whether the run still goes on: that reads all its metrics."""


def rollouts(run: RunDir, step: int | None, limit: int | None, follow: bool, as_json: bool, console: Console) -> None:
    """Prints one step, or with `follow` every step from the newest until the run ends.

    Raises `UsageError` for a step that has no file.
    """
    if follow:
        for path in _arriving(run):
            _print(path, limit, as_json, console)
        return
    _print(_file_of(run, step), limit, as_json, console)


def rollouts_by_token(run: RunDir, step: int | None, limit: int | None, page: Path | None, console: Console) -> None:
    """Prints the tokens of the first samples of one step, or writes them as a page.

    Raises `UsageError` for a step that has no file, or that no learner has told its tokens of.
    """
    from rollcast.chat import ChatCodec
    from rollcast.config_file import load_config
    from rollcast.token_page import to_page
    from rollcast.token_view import samples_of, show

    path = _file_of(run, step)
    default = SHOWN_BY_TOKEN if page is None else SHOWN
    records_shown = list(records.read(path))[: default if limit is None else limit]
    if any(record.get("learned") is None for record in records_shown):
        why = f"{path} was written before rollcast kept what the learner made of each token."
        raise UsageError(f"{run.path.name} has no token details.", why, "Train on, and ask for a newer step.")
    tokenizer = ChatCodec.of(load_config(run.config).model).tokenizer
    samples = samples_of(records_shown, lambda ids: str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)))
    number = records.step_of(path)
    if page is None:
        show(samples, number, console)
        return
    page.write_text(to_page(samples, number, run.path.name), encoding="utf-8")
    console.print(f"{page}: {len(samples)} samples of step {number}")


def _file_of(run: RunDir, step: int | None) -> Path:
    files = records.files(run.rollouts)
    chosen = files[-1:] if step is None else [path for path in files if records.step_of(path) == step]
    if chosen:
        return chosen[0]
    name = run.path.name
    if not files:
        fix = f"Wait for the first step (rollcast status {name}), or add --follow."
        raise UsageError(f"The run {name} has no rollouts yet.", f"{run.rollouts} holds no step_N.jsonl.", fix)
    first, last = records.step_of(files[0]), records.step_of(files[-1])
    why = f"Its rollouts are of the steps {first} to {last}."
    raise UsageError(
        f"The run {name} has no rollouts of step {step}.", why, f"Name one of them, such as --step {last}."
    )


def _arriving(run: RunDir) -> Iterator[Path]:
    """The newest file, then each that appears, until the run has ended and all are told.

    A resumed run goes back and writes some steps again: a file counts as new when its time is.
    """
    seen = {path: _written(path) for path in records.files(run.rollouts)[:-1]}
    for poll in _polls():
        goes_on = poll % ASK_STATE_EVERY != 0 or state_of(run) == "running"
        for path in records.files(run.rollouts):
            written = _written(path)
            if written is not None and seen.get(path) != written:
                seen[path] = written
                yield path
        if not goes_on:
            return


def _polls() -> Iterator[int]:
    poll = 0
    while True:
        yield poll
        time.sleep(POLL_S)
        poll += 1


def _written(path: Path) -> int | None:
    """When; None for a file that a resuming run has just removed."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


# ---- telling it


def _print(path: Path, limit: int | None, as_json: bool, console: Console) -> None:
    step = records.step_of(path)
    try:
        found = list(records.read(path))
    except FileNotFoundError:
        return
    if as_json:
        for record in found[:limit]:
            print(json.dumps({"step": step, **record}), flush=True)
    else:
        _show(step, found, SHOWN if limit is None else limit, console)


def _show(step: int, found: Sequence[Record], limit: int, console: Console) -> None:
    shown = table(console, "prompt", "answer", "reward", "metrics", "versions", right=("reward",))
    for record in found[:limit]:
        shown.add_row(_prompt(record), _answer(record), f"{record['reward']:.3f}", _metrics(record), _versions(record))
    console.print(f"step {step}: {min(limit, len(found))} of {len(found)} samples")
    console.print(shown)


def _prompt(record: Record) -> Text:
    return harmless(str(record["turns"][0]["observation"])) if record["turns"] else Text(record["env"])


def _answer(record: Record) -> Text:
    """What the policy said, turn by turn."""
    if record["error"] is not None:
        return Text("failed: ", style="red").append_text(harmless(str(record["error"])))
    return Text(" | ").join(harmless(str(turn["answer"])) for turn in record["turns"])


def _metrics(record: Record) -> str:
    return "  ".join(f"{name} {value:.2f}" for name, value in record["metrics"].items())


def _versions(record: Record) -> str:
    return " ".join(str(version) for version in record["versions"])
