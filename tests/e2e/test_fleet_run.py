"""A fleet that changes in a run of this process: the autoscaler, and real engines.

For the autoscaler workers sleep, so that there are cores enough, and the learner works.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import ray

from rollcast import metrics
from rollcast.config_file import load_config
from rollcast.control import find
from rollcast.run import Run
from run_checks import assert_nothing_lost, beside, wait_for

SCRIPTED = Path(__file__).resolve().parents[2] / "deploy" / "configs" / "scripted.toml"
ONE_GROUP_AT_A_TIME = ("--rollout.group_size=4", "--rollout.concurrency=4")


def idle_share(rows: list[dict[str, Any]]) -> float:
    """Of the time between the first and the last row, what the learner waited for rollouts."""
    waited = sum(row.get("time/wait_for_rollouts_s", 0.0) for row in rows[1:])
    return float(waited / (rows[-1]["time"] - rows[0]["time"]))


@pytest.mark.soak
@pytest.mark.ray
def test_the_fleet_grows_until_the_learner_is_busy_and_shrinks_when_it_is_the_bottleneck(
    tmp_path: Path, tiny_bf16: str, ray_cluster: str
) -> None:
    seconds = tmp_path / "seconds"
    seconds.write_text("0")
    words = ("--env.0.id=slow_envs:slow/Letters-v0", f"--env.0.kwargs.file={seconds}", "--eval.every=0")
    fleet = ("--rollout.workers={min = 1, max = 4}", *ONE_GROUP_AT_A_TIME, "--learner.epochs=12")
    more = ("--run.name=follows", "--run.steps=100000", f"--model.path={tiny_bf16}", f"--run.dir={tmp_path}")
    seen: dict[str, Any] = {}

    def story(run: Run) -> None:
        def rows() -> list[dict[str, Any]]:
            return metrics.read(run.folder.metrics)

        wait_for(lambda: run.step >= 4, 60)
        assert run.fleet.wanted == 1
        # Two groups a step, one after the other: 2.6 workers would just keep the learner busy.
        learns = sorted(row["time/learn_s"] for row in rows()[1:])[1]
        seconds.write_text(str(1.3 * learns))
        wait_for(lambda: run.fleet.ready() >= 3 and run.fleet.ready() == run.fleet.wanted, 90)
        step = run.step
        wait_for(lambda: run.step >= step + 10, 120)  # How many it settles on is up to how long it learns by now.
        seen.update(learns=learns, idle=idle_share(rows()[-7:]))
        seconds.write_text("0")
        wait_for(lambda: run.fleet.ready() == run.fleet.wanted == 1, 120)

    folder = beside(load_config(SCRIPTED, [*words, *fleet, *more]), story).folder
    print(seen)
    assert seen["idle"] <= 0.10
    assert_nothing_lost(folder, metrics.read(folder.metrics)[-1]["step"], 2)


@pytest.mark.ray
@pytest.mark.vllm
@pytest.mark.soak
@pytest.mark.timeout(600)
def test_real_engines_join_and_leave(tmp_path: Path, tiny_bf16: str, ray_cluster: str) -> None:
    def story(run: Run) -> None:
        control = find("engines")

        def scale(workers: int) -> None:
            ray.get(control.ask.remote(workers=workers))
            wait_for(lambda: run.fleet.ready() == run.fleet.wanted == workers and not run.fleet.draining(), 180)

        wait_for(lambda: run.step >= 3, 120)
        scale(2)
        step = run.step
        wait_for(lambda: run.step >= step + 3, 60)
        versions = {state.version for state in run.fleet._states.values()}
        assert max(versions) - min(versions) <= 1, "the new one follows every policy"
        scale(1)
        step = run.step
        wait_for(lambda: run.step >= step + 3, 60)
        assert run.fleet.restarts == 0
        events = [json.loads(line) for line in run.folder.ledger.read_text().splitlines()[:-1]]
        assert {event["worker"] for event in events if event["event"] == "lease"} == {0, 1}
        assert len(run.fleet.workers) == 1
        assert not [event for event in events if event["event"] in ("return", "refused")], "nothing played was lost"

    words = ("--rollout.engine=vllm", "--rollout.max_model_len=384", "--eval.every=0", "--run.name=engines")
    more = ("--run.steps=100000", f"--model.path={tiny_bf16}", f"--run.dir={tmp_path}")
    folder = beside(load_config(SCRIPTED, [*words, *more]), story).folder
    rows = metrics.read(folder.metrics)
    assert_nothing_lost(folder, rows[-1]["step"], 2)
    assert max(row.get("logprob_gap/mean", 0.0) for row in rows) < 0.05
    assert not list(Path("/dev/shm").glob("rollcast-engines-*"))
