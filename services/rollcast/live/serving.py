"""`rollcast serve`: a run's policy, or one checkpoint, behind HTTP until it is interrupted.

Owns: which cluster it is served on, what is served, and how long. Does not know replicas or routes.

With RAY_ADDRESS it is that cluster, where the application stays with `--detach`. Else a run that trains on this machine
is served on its own cluster, in flight; when it ends, or for a run that has ended, a cluster is started here.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

from rollcast.checkpoint import open_checkpoint
from rollcast.config import RunConfig
from rollcast.errors import UsageError
from rollcast.export import export, newest_published
from rollcast.rundir import RunDir, is_alive
from rollcast.runs import Source, owner_of, state_of

Report = Callable[[str], None]
LOOK_EVERY_S = 0.5


def serve(source: Source, config: RunConfig, report: Report, detach: bool) -> None:
    """Serves until SIGINT or SIGTERM; with `detach` leaves the application on the cluster and returns."""
    if detach and not os.environ.get("RAY_ADDRESS"):
        why = "Without RAY_ADDRESS the cluster is this process's own and ends with it."
        raise UsageError(
            "--detach leaves nothing behind here.", why, "Name a cluster with RAY_ADDRESS, or leave it out."
        )
    if config.serve.mode == "shared":
        _require_workers(source)
    fixed = None if source.checkpoint is None else _exported(source, source.checkpoint, config, report)
    if fixed is None and newest_published(source.run) is None and state_of(source.run) != "running":
        what, why = f"The run {source.run.path.name} has published no policy.", "It ended before its first checkpoint."
        raise UsageError(what, why, "Train it on with `rollcast train`, or name another run.")
    with _until_asked() as asked:
        while not asked():
            _serve_on_one_cluster(source.run, config, fixed, report, detach, asked)
            if detach or (config.serve.mode == "shared" and state_of(source.run) != "running"):
                return


def take_off(source: Source, config: RunConfig, report: Report) -> None:
    """Ends an application that `--detach`, or a run that has ended, left on the cluster that RAY_ADDRESS names."""
    from rollcast.cluster import NAMESPACE
    from rollcast.live import app

    address = os.environ.get("RAY_ADDRESS")
    if not address:
        what = "There is no cluster to take anything off."
        raise UsageError(what, "Without RAY_ADDRESS what was served ended with its command.", "Set RAY_ADDRESS.")
    with _connected(address):
        spec = app.spec_of(config, source.run.path, NAMESPACE)
        served = app.served_there()
        if spec.name not in served:
            there = ", ".join(served) or "none"
            what = f"The policy of {source.run.path.name} is not served on {address}."
            raise UsageError(what, f"Applications there: {there}.", "Name the run of one of them.")
        app.remove(spec)
        report(f"the policy of {source.run.path.name} is not served any more")


def _serve_on_one_cluster(
    run: RunDir,
    config: RunConfig,
    fixed: tuple[Path, int] | None,
    report: Report,
    detach: bool,
    asked: Callable[[], bool],
) -> None:
    """Until asked to end, or until the trainer whose cluster it is has ended."""
    from rollcast.cluster import NAMESPACE
    from rollcast.live import app

    owner = owner_of(run)
    joined = not os.environ.get("RAY_ADDRESS") and bool(owner) and is_alive(owner)
    with _connected(str(owner["address"]) if joined else os.environ.get("RAY_ADDRESS")):
        version = None
        if fixed is not None:
            model = config.model.model_copy(update={"path": str(fixed[0]), "chat_template": None})
            lora = config.lora.model_copy(update={"rank": 0})
            config, version = config.model_copy(update={"model": model, "lora": lora}), fixed[1]
        spec = app.spec_of(config, run.path, str(owner.get("namespace", NAMESPACE)), version)
        _require_devices(config)
        report(f"starting {config.serve.min_replicas} replica(s) with the {config.rollout.engine} engine")
        report(f"the live policy of {run.path.name} answers at {app.deploy(spec)}/v1 (Ctrl-C ends it)")
        if detach:
            return
        while not asked():
            time.sleep(LOOK_EVERY_S)
            if joined and not is_alive(owner):
                on = (
                    "with it its engines"
                    if config.serve.mode == "shared"
                    else "its policy is served on from its folder"
                )
                report(f"the training of {run.path.name} has ended: {on}")
                return
        app.remove(spec)


def _require_workers(source: Source) -> None:
    """Raises `UsageError` where no rollout worker plays, whose engine could answer."""
    if source.checkpoint is not None or state_of(source.run) != "running":
        what = (
            f"{source.run.path.name if source.checkpoint is None else source.checkpoint.name} has no rollout workers."
        )
        why = "With serve.mode = 'shared' they answer, and they play while a run trains."
        raise UsageError(what, why, "Serve it with --serve.mode own.")


@contextmanager
def _connected(address: str | None) -> Iterator[None]:
    """To the cluster at `address`; without one a cluster is started, which ends with this process."""
    from rollcast.cluster import session

    with ExitStack() as stack:
        try:
            stack.enter_context(session(address or "local"))
        except ConnectionError as error:
            fix = "Check the address, and that RAY_AUTH_TOKEN is that cluster's."
            raise UsageError(f"The cluster {address} cannot be reached.", str(error), fix) from error
        yield


def _require_devices(config: RunConfig) -> None:
    """Raises `UsageError` where a replica would wait for devices for ever."""
    import ray

    section, free = config.serve, ray.available_resources()
    wanted = {"CPU": section.cpus_per_replica, "GPU": section.gpus_per_replica}
    for kind, each in wanted.items():
        needed = each * section.min_replicas
        if needed > free.get(kind, 0.0):
            raise UsageError(
                f"The live policy needs {needed:g} {kind}s; {free.get(kind, 0.0):g} are free on the cluster.",
                f"{section.min_replicas} replica(s) reserve {each:g} each.",
                f"Add nodes, or lower --serve.{kind.lower()}s_per_replica: 0 shares what others have reserved.",
            )


def _exported(source: Source, checkpoint: Path, config: RunConfig, report: Report) -> tuple[Path, int]:
    """The checkpoint as a model folder below the run's, where every node finds it, and its version."""
    target = source.run.path / "live" / checkpoint.name
    if not target.is_dir():
        target.parent.mkdir(mode=0o700, exist_ok=True)
        report(f"writing {checkpoint.name} as a model folder")
        return target, export(source, target, None, config, report).policy_version
    return target, int(open_checkpoint(checkpoint).trainer["policy_version"])


@contextmanager
def _until_asked() -> Iterator[Callable[[], bool]]:
    """Whether SIGINT or SIGTERM has asked to end."""
    asked = False

    def ask(_: int, __: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
