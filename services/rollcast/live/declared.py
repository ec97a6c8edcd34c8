"""The live policy for whoever declares applications to Ray Serve, such as KubeRay's RayService (deploy/kuberay).

Owns: the arguments of `import_path: rollcast.live.declared:application`. Does not know what is served, nor on which
address: that is part of the declaration. So a key is always required here.
"""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from rollcast.errors import UsageError
from rollcast.export import settings_of
from rollcast.rundir import RunDir
from rollcast.runs import is_run


class Declared(BaseModel):
    """`args` of the application."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: Path
    """Folder of a run, where every node finds it."""
    keys_file: Annotated[str, Field(min_length=1)]
    """File of API keys, where every node finds it."""
    settings: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """Further settings, by their dotted names, such as `serve.gpus_per_replica`."""


def application(declared: Declared) -> Any:
    """The Serve application that follows a run. Raises `UsageError` where there is none, or a setting does not fit."""
    from rollcast import cluster
    from rollcast.live.app import application as live_policy
    from rollcast.live.app import spec_of

    if not is_run(declared.run):
        why = f"{declared.run} holds no run.json."
        raise UsageError("There is no run to serve.", why, "Train one into that folder first, or name another.")
    words = [f"--{name}={_typed(value)}" for name, value in declared.settings.items()]
    config = settings_of(RunDir(declared.run), [*words, f"--serve.keys_file={declared.keys_file}"])
    return live_policy(spec_of(config, declared.run, cluster.NAMESPACE))


def _typed(value: str | float | bool) -> str:
    """As it is typed on the command line."""
    return str(value).lower() if isinstance(value, bool) else str(value)
