"""docker-compose.yml: valid, closed to the outside, and big enough for the run it is made for."""

import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from deployment import DEPLOY, ROOT, compose, documents, schema
from rollcast.config import RunConfig
from rollcast.config_file import load_config

FILE = compose()
SERVICES: dict[str, dict[str, Any]] = FILE["services"]
NODES = {name: service for name, service in SERVICES.items() if "rollcast:" in service["image"]}


def in_profile(profile: str) -> dict[str, dict[str, Any]]:
    return {name: service for name, service in SERVICES.items() if profile in service.get("profiles", [profile])}


def option(service: dict[str, Any], name: str) -> str:
    (found,) = [word.partition("=")[2] for word in service["command"] if word.startswith(f"--{name}=")]
    return str(found)


def test_it_is_a_compose_file() -> None:
    assert list(jsonschema.Draft7Validator(schema("compose-spec")).iter_errors(FILE)) == []


@pytest.mark.parametrize("missing", ["ROLLCAST_TOKEN_FILE", "ROLLCAST_GRAFANA_PASSWORD_FILE"])
def test_without_a_secret_it_refuses_and_says_where_to_read(missing: str) -> None:
    there = {"ROLLCAST_TOKEN_FILE": "t", "ROLLCAST_GRAFANA_PASSWORD_FILE": "g"}
    del there[missing]
    with pytest.raises(ValueError, match=rf"{missing} .*deploy/README\.md"):
        compose(there)


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_a_profile_has_every_role(profile: str) -> None:
    roles = {name.removesuffix("-gpu") for name in in_profile(profile)}
    assert roles == {"head", "rollout", "learner", "prometheus", "grafana"}
    heads = [s for name, s in in_profile(profile).items() if name.startswith("head")]
    assert [head["networks"]["cluster"]["aliases"] for head in heads] == [["head"]]


@pytest.mark.parametrize("name", SERVICES)
def test_a_container_has_no_rights_that_it_does_not_need(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["user"].split(":")[0] not in ("", "0", "root")
    assert not {"privileged", "cap_add", "devices", "network_mode", "pid", "ipc", "userns_mode"} & service.keys()
    assert service["networks"] in (["cluster"], {"cluster": {"aliases": ["head"]}})
    assert "docker.sock" not in str(service)
    assert {"cpus", "memory", "pids"} <= service["deploy"]["resources"]["limits"].keys()
    assert service["healthcheck"]["test"][0] == "CMD"
    assert re.search(r":[\w.-]+$", service["image"])
    assert not service["image"].endswith(":latest")


@pytest.mark.parametrize("name", SERVICES)
def test_ports_are_on_loopback_only(name: str) -> None:
    assert all(re.match(r"^127\.0\.0\.1:\d+:\d+$", port) for port in SERVICES[name].get("ports", []))


def test_only_the_head_and_the_dashboards_have_ports() -> None:
    assert {name for name, service in SERVICES.items() if "ports" in service} == {
        *("head", "head-gpu", "prometheus", "grafana")
    }


@pytest.mark.parametrize("name", NODES)
def test_a_node_has_the_token_and_asks_for_it(name: str) -> None:
    node = NODES[name]
    assert node["environment"] == {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/run/secrets/ray_token"}
    assert node["secrets"] == ["ray_token"]
    assert set(FILE["secrets"]["ray_token"]) == {"file"}
    assert node["init"] is True


@pytest.mark.parametrize("name", NODES)
def test_a_node_can_write_where_ray_and_engines_do(name: str) -> None:
    node = NODES[name]
    places = {mount.partition(":")[0]: mount for mount in node["tmpfs"]}
    assert option(node, "temp-dir").startswith("/tmp/")
    assert all("exec" in places[place].split(":")[1].split(",") for place in ("/tmp", "/home/rollcast"))
    runs, models = node["volumes"]
    assert (runs["target"], runs.get("read_only", False)) == ("/runs", False)
    assert (models["target"], models["read_only"]) == ("/models", True)
    # A folder that Docker made for root could not be written.
    assert runs["bind"] == models["bind"] == {"create_host_path": False}


@pytest.mark.parametrize("name", NODES)
def test_objects_and_policies_fit_into_shared_memory(name: str) -> None:
    assert int(option(NODES[name], "object-store-memory")) <= int(NODES[name]["shm_size"].removesuffix("gb")) * 1e9 / 2


@pytest.mark.parametrize("name", NODES)
def test_ray_knows_the_command(name: str) -> None:
    from ray.scripts.scripts import start

    words = NODES[name]["command"]
    assert words[:2] == ["ray", "start"]
    assert "--block" in words
    start.make_context("start", words[2:])


def test_gpus_are_asked_for_where_they_are_promised() -> None:
    for name, node in NODES.items():
        reserved = node["deploy"]["resources"].get("reservations", {}).get("devices", [])
        assert len(reserved) == int(option(node, "num-gpus")), name
    assert (
        SERVICES["rollout-gpu"]["deploy"]["resources"]["reservations"]
        != (SERVICES["learner-gpu"]["deploy"]["resources"]["reservations"])
    )


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_the_cluster_holds_its_run_and_the_learner_has_a_node_for_itself(profile: str) -> None:
    config: RunConfig = load_config(DEPLOY / "configs" / f"cluster-{profile}.toml")
    suffix = "-gpu" if profile == "gpu" else ""
    rollout, learner = SERVICES[f"rollout{suffix}"], SERVICES[f"learner{suffix}"]
    replicas = rollout["deploy"].get("replicas", 1)
    per_node = int(option(rollout, "num-cpus")) // config.rollout.cpus_per_worker
    if config.rollout.gpus_per_worker:
        per_node = min(per_node, int(int(option(rollout, "num-gpus")) / config.rollout.gpus_per_worker))
    assert isinstance(config.rollout.workers, int)
    assert config.rollout.workers <= per_node * replicas
    assert config.learner.cpus_per_learner <= int(option(learner, "num-cpus"))
    assert config.learner.gpus_per_learner == int(option(learner, "num-gpus"))
    if profile == "cpu":
        assert config.learner.cpus_per_learner > int(option(rollout, "num-cpus"))
    for name, node in in_profile(profile).items():
        if name in NODES and not name.startswith("head"):
            assert int(option(node, "num-cpus")) <= int(node["deploy"]["resources"]["limits"]["cpus"])


def test_files_that_it_mounts_and_builds_from_are_there() -> None:
    for service in SERVICES.values():
        for volume in service.get("volumes", []):
            if isinstance(volume, str) and volume.startswith("./"):
                assert (ROOT / volume.partition(":")[0]).exists(), volume
        if "build" in service:
            assert (ROOT / service["build"]["dockerfile"]).is_file()


def test_prometheus_asks_the_head_with_the_token() -> None:
    (config,) = documents(DEPLOY / "prometheus" / "prometheus.yml")
    (scrape,) = config["scrape_configs"]
    (discovery,) = scrape["http_sd_configs"]
    assert discovery["url"] == f"http://head:{option(SERVICES['head'], 'dashboard-port')}/api/prometheus/sd"
    assert discovery["authorization"] == {"type": "Bearer", "credentials_file": "/run/secrets/ray_token"}
    assert "ray_token" in SERVICES["prometheus"]["secrets"]


def test_grafana_finds_prometheus_and_the_dashboard() -> None:
    (sources,) = documents(DEPLOY / "grafana" / "provisioning" / "datasources" / "prometheus.yml")
    (providers,) = documents(DEPLOY / "grafana" / "provisioning" / "dashboards" / "rollcast.yml")
    assert sources["datasources"][0]["url"] == "http://prometheus:9090"
    mounted = {volume.split(":")[1]: volume.split(":")[0] for volume in SERVICES["grafana"]["volumes"]}
    folder = Path(mounted[providers["providers"][0]["options"]["path"]])
    assert (ROOT / folder / "rollcast.json").is_file()
