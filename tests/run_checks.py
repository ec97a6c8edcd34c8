"""What holds of every run, whatever happened to it, read from its folder; waiting for something to happen; and a run
with a story beside it.

Owns: the invariants that fault and fleet tests share. Does not know what was done to the run.
"""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable

from rollcast import metrics
from rollcast.config import RunConfig
from rollcast.plan import run_directory
from rollcast.run import Run
from rollcast.rundir import RunDir
from rollcast.session import opened
from rollcast.train import loop


def beside(config: RunConfig, story: Callable[[Run], None]) -> Run:
    """Runs until `story`, which is told beside it, has come to its end; what it failed with is raised here."""
    failures: list[BaseException] = []

    def tell() -> None:
        try:
            story(run)
        except BaseException as error:  # Raised in the test's own thread below.
            failures.append(error)
        run.stop.ask()

    with opened(config, run_directory(config), "auto", Run) as run:
        thread = threading.Thread(target=tell, daemon=True)
        thread.start()
        run.see_through(loop)
        thread.join(30)
    if failures:
        raise failures[0]
    return run


def wait_for(condition: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def assert_nothing_lost(folder: RunDir, steps: int, groups_per_step: int) -> Counter[str]:
    """Every group is done once, failed, or back to pending; returns how often each journal event stands there.

    Training that a rollback undid does not count.
    """
    events = [json.loads(line) for line in folder.ledger.read_text().splitlines()]
    trained: list[tuple[int, int]] = []
    for event in events:
        if event["event"] == "done":
            trained.append((event["group"], event["step"]))
        elif event["event"] == "rollback":
            trained = [(group, step) for group, step in trained if step <= event["step"]]
    done = Counter(group for group, _ in trained)
    assert len(done) == steps * groups_per_step
    assert set(done.values()) == {1}, "no group is trained twice"
    assert metrics.read(folder.metrics)[-1]["step"] == steps
    return Counter(event["event"] for event in events)
