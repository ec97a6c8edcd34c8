"""The live policy as KubeRay's RayService declares it: a run's settings, the declaration's own, and always a key."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as build

from deployment import DEPLOY
from rollcast.config_file import load_config
from rollcast.errors import ConfigError, UsageError
from rollcast.live.declared import application
from rollcast.rundir import RunDir


@pytest.fixture
def run(tmp_path: Path, tiny_bf16: str) -> Path:
    """A run as its folder tells of it."""
    folder = RunDir(tmp_path / "told")
    folder.create()
    config = load_config(DEPLOY / "configs" / "cluster-scripted.toml", [f"--model.path={tiny_bf16}"])
    folder.config.write_text(config.to_toml(), encoding="utf-8")
    folder.run_json.write_text(json.dumps({"name": "told"}), encoding="utf-8")
    return folder.path


def declared(run: Path, **changed: Any) -> dict[str, Any]:
    settings = {"serve.cpus_per_replica": 2, "serve.max_new_tokens": 16, "serve.keep_best": False}
    return {"run": str(run), "keys_file": str(run / "keys.json"), "settings": settings, **changed}


def test_serve_builds_it_from_its_arguments(run: Path) -> None:
    built = build(application, declared(run))
    (spec,) = built._bound_deployment.init_args
    assert spec.run == run
    assert spec.config.serve.keys_file == str(run / "keys.json")
    assert (spec.config.serve.max_new_tokens, spec.config.serve.keep_best) == (16, False)
    assert built._bound_deployment.ray_actor_options["num_cpus"] == 2
    assert spec.config.model.path == load_config(run / "config.toml").model.path


def test_a_key_is_always_required(run: Path) -> None:
    arguments = declared(run)
    del arguments["keys_file"]
    with pytest.raises(ValidationError, match="keys_file"):
        build(application, arguments)


def test_what_does_not_fit_is_told(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"There is no run to serve"):
        build(application, declared(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="max_replica"):
        build(application, declared(run, settings={"serve.max_replica": 2}))
    with pytest.raises(ValidationError, match="where"):
        build(application, declared(run, where="there"))
