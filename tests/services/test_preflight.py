"""What a run needs against what a cluster has: tables of nodes, no cluster."""

from dataclasses import replace

import pytest

from rollcast.errors import ConfigError
from rollcast.plan import Process
from rollcast.preflight import Node, NodeReport, device_problems, most_beside, node_problems, refuse

HERE = NodeReport("the trainer", python="3.11.7", ray="2.60.0", code="c0de" * 16)


def workers(count: int, cpus: int = 1, gpus: float = 0.0) -> Process:
    return Process("rollout worker", count, cpus, gpus, "")


def learners(count: int, cpus: int = 1, gpus: float = 0.0) -> Process:
    return Process("learner", count, cpus, gpus, "")


def nodes(*devices: tuple[float, float]) -> list[Node]:
    return [Node(f"10.0.0.{number}", cpus, gpus) for number, (cpus, gpus) in enumerate(devices, 1)]


@pytest.mark.parametrize(
    ("processes", "cluster"),
    [
        ([workers(1), learners(1)], nodes((2, 0))),
        ([workers(4, 2), learners(1, 4)], nodes((4, 0), (8, 0))),
        ([workers(3, 2), learners(2, 3)], nodes((5, 0), (7, 0))),
        ([learners(2, 3), workers(3, 2)], nodes((4, 0), (8, 0))),
        ([workers(2, 1, 0.5), learners(1, 1, 1)], nodes((4, 2))),
        ([workers(10, 1, 0.1)], nodes((10, 1))),
        ([workers(3, 1, 0.3), learners(2, 1, 0.5)], nodes((8, 2))),
        ([Process("trainer", 1, 0, 0, "")], nodes((0, 0))),
        ([], nodes((1, 0))),
    ],
)
def test_what_fits_is_let_through(processes: list[Process], cluster: list[Node]) -> None:
    assert device_problems(processes, cluster) == []
    refuse(device_problems(processes, cluster))


@pytest.mark.parametrize(
    ("processes", "cluster", "said"),
    [
        ([workers(2, 1, 1), learners(1, 1, 1)], nodes((8, 2)), "it needs 3 GPUs, the cluster has 2"),
        ([workers(3), learners(1)], nodes((2, 0), (1, 0)), "it needs 4 CPUs, the cluster has 3"),
        ([workers(1)], [], "it needs 1 CPU, the cluster has 0"),
        ([workers(1, 4)], nodes((2, 0), (3, 0)), "a rollout worker needs 4 CPUs on one node"),
        ([workers(1, 2, 1)], nodes((1, 1), (8, 0)), "a rollout worker needs 2 CPUs and 1 GPU on one node"),
        ([workers(3, 2)], nodes((3, 0), (3, 0)), "3 x rollout worker are wanted, and there is room for 2"),
        ([learners(2, 3), workers(3, 2)], nodes((11, 0), (1, 0)), "wanted beside 2 x learner, and there is room for 2"),
        # Two rests of a GPU are no GPU: three shares of 0.6 need three GPUs.
        ([workers(3, 1, 0.6)], nodes((8, 2)), "3 x rollout worker are wanted, and there is room for 2"),
    ],
)
def test_what_would_wait_for_ever_is_told(processes: list[Process], cluster: list[Node], said: str) -> None:
    found = device_problems(processes, cluster)
    assert len(found) == 1 and said in found[0][0]
    assert all(found[0]), "what, why and what to do"


def test_both_kinds_of_devices_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        refuse(device_problems([workers(4, 1, 1)], nodes((1, 1))))
    assert "2 things do not fit" in caught.value.what
    assert "4 CPUs" in caught.value.why and "4 GPUs" in caught.value.why
    assert "rollout.gpus_per_worker" in caught.value.fix


def test_the_count_beside_is_the_best_of_all_ways() -> None:
    """By trying every way to share two learners out among three nodes."""
    cluster, one, other = nodes((5, 0), (7, 0), (4, 0)), learners(2, 3), workers(9, 2)
    ways = [(a, b, 2 - a - b) for a in range(3) for b in range(3 - a)]
    rooms = [
        sum(int((node.cpus - 3 * n) // 2) for node, n in zip(cluster, way, strict=True))
        for way in ways
        if all(3 * n <= node.cpus for node, n in zip(cluster, way, strict=True))
    ]
    assert most_beside(one, other, cluster) == max(rooms) == 5
    assert most_beside(learners(6, 3), other, cluster) == -1


def test_nodes_that_agree_have_no_problem() -> None:
    reports = [replace(HERE, name="10.0.0.1"), replace(HERE, name="10.0.0.2")]
    assert node_problems(reports, HERE, "/data/model", "/data/runs") == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"silent": "no answer within 120 s"}, "rollcast cannot be run on node 10.0.0.2"),
        ({"python": "3.12.1"}, "Python is not the same on all nodes"),
        ({"ray": "2.59.0"}, "Ray is not the same on all nodes"),
        ({"code": "0ld" * 20}, "rollcast's code is not the same on all nodes"),
        ({"has_engine": False}, "rollout.engine: vLLM is not installed on node 10.0.0.2"),
        ({"sees_model": False}, "model.path: '/data/model' is not on node 10.0.0.2"),
        ({"sees_run_folder": False}, "run.dir: '/data/runs' is another folder on node 10.0.0.2"),
    ],
)
def test_a_node_that_differs_is_named(change: dict[str, object], said: str) -> None:
    reports = [replace(HERE, name="10.0.0.1"), replace(HERE, name="10.0.0.2", **change)]  # type: ignore[arg-type]
    ((what, why, fix),) = node_problems(reports, HERE, "/data/model", "/data/runs")
    assert what.startswith(said) and why and fix


def test_a_learner_with_a_gpu_is_refused_where_torch_is_for_cpus() -> None:
    """Of nodes without a GPU nothing is asked: it is not placed there."""
    head = replace(HERE, name="10.0.0.1", torch="2.13.0+cpu")
    right, wrong = replace(head, torch="2.13.0", gpus=2.0), replace(head, name="10.0.0.2", gpus=2.0)
    assert node_problems([head, right], HERE, "/m", "/r", True) == []
    assert node_problems([head, wrong], HERE, "/m", "/r", False) == []
    ((what, _, fix),) = node_problems([head, wrong], HERE, "/m", "/r", True)
    assert what == "learner.gpus_per_learner: torch is a build for CPUs on node 10.0.0.2" and "nvidia" in fix
