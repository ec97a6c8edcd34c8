"""The manifests for KubeRay: valid for its operator, closed, and big enough for the run they start."""

import importlib
import shlex
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray.scripts.scripts import start

from deployment import DEPLOY, documents, pod_templates, schema, strict
from rollcast.config_file import load_config
from rollcast.live.declared import Declared

FOLDER = DEPLOY / "kuberay"
KINDS = {
    "RayJob": ("kuberay-rayjobs-v1", "rayClusterSpec"),
    "RayService": ("kuberay-rayservices-v1", "rayClusterConfig"),
}
MANIFESTS = [document for path in sorted(FOLDER.glob("*.yaml")) for document in documents(path)]
RAY = {document["kind"]: document for document in MANIFESTS if document["kind"] in KINDS}
CLAIMS = {document["metadata"]["name"] for document in MANIFESTS if document["kind"] == "PersistentVolumeClaim"}


def cluster(kind: str) -> dict[str, Any]:
    found: dict[str, Any] = RAY[kind]["spec"][KINDS[kind][1]]
    return found


def groups(kind: str) -> list[dict[str, Any]]:
    return [cluster(kind)["headGroupSpec"], *cluster(kind)["workerGroupSpecs"]]


@pytest.mark.parametrize("kind", RAY)
def test_it_is_valid_for_the_operator(kind: str) -> None:
    assert RAY[kind]["apiVersion"] == "ray.io/v1"
    jsonschema.Draft202012Validator(strict(schema(KINDS[kind][0]))).validate(RAY[kind])


def test_a_misspelt_key_would_be_seen() -> None:
    wrong = {"spec": {"rayClusterSpecs": {}}, "apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {}}
    with pytest.raises(jsonschema.ValidationError, match="rayClusterSpecs"):
        jsonschema.Draft202012Validator(strict(schema("kuberay-rayjobs-v1"))).validate(wrong)


@pytest.mark.parametrize("kind", RAY)
def test_nobody_gets_in_without_the_token(kind: str) -> None:
    assert cluster(kind)["authOptions"] == {"mode": "token", "secretName": "rollcast-token"}
    # The operator takes the option from this version of Ray on, and only where it is named.
    assert cluster(kind)["rayVersion"] == ray.__version__


@pytest.mark.parametrize("kind", RAY)
def test_pods_have_no_rights_that_they_do_not_need(kind: str) -> None:
    """Kubernetes' "restricted" standard, and a root file system that nothing writes to."""
    for template in pod_templates(RAY[kind]):
        spec = template["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] == 1000
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {"cpu", "memory"} <= container["resources"]["limits"].keys()
            assert container["image"] in ("rollcast:cpu", "rollcast:cuda")


@pytest.mark.parametrize("kind", RAY)
def test_pods_can_write_where_ray_and_engines_do(kind: str) -> None:
    for group in groups(kind):
        spec = group["template"]["spec"]
        mounts = {mount["mountPath"]: mount for mount in spec["containers"][0]["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        assert {"/tmp", "/home/rollcast", "/dev/shm", "/runs", "/models"} <= mounts.keys()
        assert volumes[mounts["/dev/shm"]["name"]]["emptyDir"]["medium"] == "Memory"
        assert mounts["/models"]["readOnly"] is True
        assert {
            v["persistentVolumeClaim"]["claimName"] for v in volumes.values() if "persistentVolumeClaim" in v
        } == CLAIMS


@pytest.mark.parametrize("kind", RAY)
def test_every_pod_is_under_the_network_policy(kind: str) -> None:
    (policy,) = [document for document in MANIFESTS if document["kind"] == "NetworkPolicy"]
    labels = policy["spec"]["podSelector"]["matchLabels"]
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    for template in pod_templates(RAY[kind]):
        assert labels.items() <= template["metadata"]["labels"].items()


@pytest.mark.parametrize("kind", RAY)
def test_ray_knows_the_start_parameters(kind: str) -> None:
    for group in groups(kind):
        words = [f"--{name}={value}" for name, value in group["rayStartParams"].items()]
        start.make_context("start", ["--block", *words])
        assert group["rayStartParams"]["metrics-export-port"] == "8080"


def test_the_job_trains_a_committed_configuration_that_its_cluster_holds() -> None:
    words = shlex.split(RAY["RayJob"]["spec"]["entrypoint"])
    assert words[:4] == ["python", "-m", "rollcast", "train"]
    config = load_config(DEPLOY.parent / words[4].removeprefix("/opt/rollcast/"))
    rollout, learner = cluster("RayJob")["workerGroupSpecs"]
    limits = rollout["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert config.rollout.workers == rollout["replicas"]
    assert config.rollout.cpus_per_worker <= int(limits["cpu"])
    assert config.rollout.gpus_per_worker == int(limits["nvidia.com/gpu"]) == config.learner.gpus_per_learner
    assert config.learner.num_learners == learner["replicas"]


def test_the_service_declares_an_application_that_serve_takes() -> None:
    from ray.serve.schema import ServeDeploySchema

    declared = ServeDeploySchema.model_validate(yaml.safe_load(RAY["RayService"]["spec"]["serveConfigV2"]))
    (application,) = declared.applications
    module, _, name = application.import_path.partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    arguments = Declared.model_validate(application.args)
    assert str(arguments.run) == f"/runs/{load_config(DEPLOY / 'configs' / 'cluster-gpu.toml').run.name}"
    (group,) = cluster("RayService")["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert int(arguments.settings["serve.cpus_per_replica"]) <= int(limits["cpu"])
    assert arguments.settings["serve.gpus_per_replica"] == int(limits["nvidia.com/gpu"])
    assert arguments.settings["serve.max_replicas"] == group["replicas"]


def test_a_worker_group_says_how_far_it_scales() -> None:
    for kind in RAY:
        for group in cluster(kind)["workerGroupSpecs"]:
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
