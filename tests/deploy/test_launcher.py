"""deploy/ray-cluster.yaml: valid for Ray's cluster launcher, with the token, and without `ray stop` of its own."""

from typing import Any

import pytest
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start

from deployment import DEPLOY, documents

(FILE,) = documents(DEPLOY / "ray-cluster.yaml")
COMMANDS = [*FILE["head_start_ray_commands"], *FILE["worker_start_ray_commands"]]


def test_ray_takes_it() -> None:
    prepared: dict[str, Any] = prepare_config(FILE)
    validate_config(prepared)
    assert prepared["max_workers"] == len(FILE["provider"]["worker_ips"])


@pytest.mark.parametrize("command", COMMANDS, ids=["head", "worker"])
def test_a_node_starts_with_the_token_or_not_at_all(command: str) -> None:
    setting, _, rest = command.partition(";")
    assert "RAY_AUTH_MODE=token" in setting.split()
    assert "ray stop" not in rest
    assert "~/.ray/auth_token" in FILE["file_mounts"]
    words = rest.partition("ray start ")[2].split()
    start.make_context("start", words)
    assert "--dashboard-host=0.0.0.0" not in words


def test_secrets_and_results_are_not_copied_to_the_machines() -> None:
    assert {"deploy/secrets", "runs", "models", ".git", ".venv"} <= set(FILE["rsync_exclude"])
