"""The autoscaler in a run: workers that sleep, so that there are cores enough, and a learner that works."""

import threading
from pathlib import Path
from typing import Any

import pytest

from rollcast import metrics
from rollcast.config_file import load_config
from rollcast.run import Run
from rollcast.rundir import RunDir
from rollcast.session import opened
from rollcast.train import loop
from run_checks import assert_nothing_lost, wait_for

SCRIPTED = Path(__file__).resolve().parents[2] / "deploy" / "configs" / "scripted.toml"
ONE_GROUP_AT_A_TIME = ("--rollout.group_size=4", "--rollout.concurrency=4")


def idle_share(rows: list[dict[str, Any]]) -> float:
    """Of the time between the first and the last row, what the learner waited for rollouts."""
    waited = sum(row.get("time/wait_for_rollouts_s", 0.0) for row in rows[1:])
    return float(waited / (rows[-1]["time"] - rows[0]["time"]))


@pytest.mark.ray
def test_the_fleet_grows_until_the_learner_is_busy_and_shrinks_when_it_is_the_bottleneck(
    tmp_path: Path, tiny_bf16: str, ray_cluster: str
) -> None:
    seconds = tmp_path / "seconds"
    seconds.write_text("0")
    words = ("--env.0.id=slow_envs:slow/Letters-v0", f"--env.0.kwargs.file={seconds}", "--eval.every=0")
    fleet = ("--rollout.workers={min = 1, max = 4}", *ONE_GROUP_AT_A_TIME, "--learner.epochs=12")
    more = ("--run.name=follows", "--run.steps=100000", f"--model.path={tiny_bf16}", f"--run.dir={tmp_path}")
    config = load_config(SCRIPTED, [*words, *fleet, *more])
    folder = RunDir(tmp_path / "follows")
    seen: dict[str, Any] = {}
    failures: list[BaseException] = []

    def rows() -> list[dict[str, Any]]:
        return metrics.read(folder.metrics)

    def story() -> None:
        try:
            wait_for(lambda: run.step >= 4, 60)
            seen["alone"] = run.fleet.wanted
            # Two groups a step, one after the other: 2.6 workers would just keep the learner busy.
            learns = sorted(row["time/learn_s"] for row in rows()[1:])[1]
            seconds.write_text(str(1.3 * learns))
            wait_for(lambda: run.fleet.ready() >= 3 and run.fleet.ready() == run.fleet.wanted, 90)
            step = run.step
            wait_for(lambda: run.step >= step + 10, 120)
            seen["grown"] = run.fleet.ready()
            seen["idle"] = idle_share(rows()[-7:])
            seconds.write_text("0")
            wait_for(lambda: run.fleet.ready() == run.fleet.wanted == 1, 120)
        except BaseException as error:  # Told in the test's own thread below.
            failures.append(error)
        run.stop.ask()

    with opened(config, folder.path, "auto", Run) as run:
        thread = threading.Thread(target=story)
        thread.start()
        run.see_through(loop)
        thread.join(10)
    if failures:
        raise failures[0]
    assert seen["alone"] == 1 and seen["grown"] >= 3
    assert seen["idle"] <= 0.10, seen
    assert_nothing_lost(folder, rows()[-1]["step"], 2)
