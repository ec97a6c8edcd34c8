"""The live policy as a Ray Serve application: `Replica` and its routes, once in each of Serve's replicas.

Owns: what a replica is built from, that it exits with its engine, and how the application comes to a cluster. Does not
know how answers are made. Each replica is ingress and engine in one: a second hop through Serve costs more time than
all the rest (measured: 3 to 6 ms a request, 10 a stream of 16 tokens).

A replica is ready once its engine holds the newest policy. Serve's HTTP data plane has no authentication of its own:
keys and limits are the gate's, inside the application.
"""

import asyncio
import logging
import os
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import ray

from rollcast import cluster  # First: it sets what torch and transformers read on import.
from rollcast.chat import ChatCodec
from rollcast.config import RunConfig
from rollcast.engine_traces import engine_record
from rollcast.engines import start_engine
from rollcast.errors import RunFailed, UsageError
from rollcast.live import feedback_actor
from rollcast.live.feedback_tables import database_of, open_to_write
from rollcast.live.keys import KeysFile
from rollcast.live.replica import Replica
from rollcast.live.routes import LiveRoutes, Served
from rollcast.live.shared import Crew
from rollcast.live.shelf import Shelf
from rollcast.live.sources import RunControl, Trainer
from rollcast.live.versions import Alias
from rollcast.rundir import RunDir
from rollcast.sampler import EngineDied, Sampler
from rollcast.weights import owned_folder, sweep_abandoned

WATCH_EVERY_S = 1.0
HEALTH_EVERY_S = 5.0
REQUESTS = 10_000
"""More than a replica ever takes on: the gate's limits refuse with an answer, where Serve's own would not."""
DEPLOYMENT = "LivePolicy"


@dataclass(frozen=True)
class LiveSpec:
    """Everything a replica is built from, wherever it starts."""

    config: RunConfig
    run: Path
    dtype: str
    namespace: str
    """In which the run's control is found."""
    version: int | None = None
    """Of a checkpoint, which `model.path` then names; None follows the run."""
    node: str | None = None
    """Of whoever deploys it, where the run folder certainly is: there the feedback's writer lives."""

    @property
    def name(self) -> str:
        """Of the application."""
        return f"live-{self.run.name}"

    @property
    def feedback(self) -> tuple[str, float, float]:
        """Database, days and MiB of what is kept."""
        settings = self.config.feedback
        return database_of(RunDir(self.run), settings), settings.keep_days, settings.max_mib


class LivePolicy:
    """One replica. Serve calls the constructor, builds the application, and asks for its health."""

    async def __init__(self, spec: LiveSpec) -> None:  # type: ignore[misc]  # Serve awaits it.
        self.spec = spec
        self._held = ExitStack()
        sweep_abandoned()
        self._folder = self._held.enter_context(owned_folder("live"))
        self.codec = ChatCodec.of(spec.config.model)
        self.replica = self._replica(spec)
        self.desk = await asyncio.to_thread(_desk, spec)
        try:
            await self.replica.start()
        except EngineDied as error:
            self._exit(error)
        self._tasks = [asyncio.ensure_future(self._follow()), asyncio.ensure_future(self._exit_with_engine())]

    def __serve_build_asgi_app__(self) -> Any:
        config = self.spec.config
        served = Served(RunDir(self.spec.run), config.rollout.max_model_len, config.serve.max_new_tokens)
        fleet = RunFleet(self.spec.run.name, self.spec.namespace)
        keys = None if config.serve.keys_file is None else KeysFile(config.serve.keys_file)
        return LiveRoutes(self.replica, served, fleet, self.desk).app(keys, config.serve.limits_of_replica)

    async def check_health(self) -> None:
        if not await self.replica.alive():
            self._exit("the engine's process is gone")

    async def pid(self) -> int:
        return os.getpid()

    async def place(self) -> tuple[str, tuple[str, ...]]:
        """The node, and the GPUs there, that Ray has given it."""
        context = ray.get_runtime_context()
        return context.get_node_id(), tuple(context.get_accelerator_ids().get("GPU", ()))

    def _replica(self, spec: LiveSpec) -> Replica:
        serving, gap = spec.config.serve, spec.config.weights.probe_max_gap
        run, control = RunDir(spec.run), RunControl(spec.run.name, spec.namespace)
        if serving.mode == "shared":
            return Replica(self.codec, self._engine, None, None, gap, Crew(control, serving.slots_of_replica))
        follows = spec.version is None
        source = Trainer(run, control, f"live-{os.getpid()}") if follows else None
        shelf = Shelf(run, serving.canary) if follows and serving.keep_best else None
        return Replica(self.codec, self._engine, source, shelf, gap)

    async def _engine(self, alias: Alias) -> Sampler:
        config = self.spec.config
        return await start_engine(
            config,
            self.spec.dtype,
            self.codec,
            self._folder / engine_record(alias),
            concurrency=config.serve.limits.ongoing,
            threads=max(1, int(config.serve.cpus_per_replica)),
            version=-1 if self.spec.version is None else self.spec.version,
        )

    async def _follow(self) -> None:
        try:
            await self.replica.follow()
        except BaseExceptionGroup as group:
            died, others = group.split(EngineDied)
            if died is not None:
                self._exit(died.exceptions[0])
            raise others or group from None

    async def _exit_with_engine(self) -> None:
        while await self.replica.alive():
            following = self._tasks[0]  # A checkpoint's replica has nothing to follow, and is done with it at once.
            if following.done() and not following.cancelled() and (failure := following.exception()) is not None:
                self._exit(f"it follows its run no more: {failure!r}")
            await asyncio.sleep(WATCH_EVERY_S)
        self._exit("the engine's process is gone")

    def _exit(self, reason: object) -> NoReturn:
        """Serve starts another replica, which begins with the current policy."""
        print(f"rollcast {self.spec.name}: {reason}; exiting to be replaced", file=sys.stderr, flush=True)
        os._exit(1)


class RunFleet:
    """The fleet of a run, through its control."""

    def __init__(self, run: str, namespace: str) -> None:
        self.run, self.namespace = run, namespace

    async def status(self) -> Mapping[str, Any]:
        return await asyncio.to_thread(self._ask, "status", {})

    async def scale(self, workers: int) -> Mapping[str, Any]:
        await asyncio.to_thread(self._ask, "ask", {"workers": workers})
        return {"run": self.run, "workers": workers, **await self.status()}

    def _ask(self, method: str, wish: dict[str, Any]) -> Any:
        from rollcast import control

        actor = control.find(self.run, self.namespace)
        return control.answer(getattr(actor, method).remote(**wish), self.run)


def application(spec: LiveSpec) -> Any:
    """The Serve application, to be run."""
    from ray import serve

    section = spec.config.serve
    scale: dict[str, Any] = {"num_replicas": section.min_replicas}
    if section.most_replicas > section.min_replicas:
        # Serve adds replicas before anybody has to wait for a turn.
        wanted = max(1, section.limits.ongoing // 2)
        scale = {
            "autoscaling_config": {
                "min_replicas": section.min_replicas,
                "max_replicas": section.most_replicas,
                "target_ongoing_requests": wanted,
            }
        }
    deployment = serve.deployment(
        serve.ingress()(LivePolicy),
        name=DEPLOYMENT,
        max_ongoing_requests=REQUESTS,
        health_check_period_s=HEALTH_EVERY_S,
        graceful_shutdown_timeout_s=20,
        ray_actor_options={"num_cpus": section.cpus_per_replica, "num_gpus": section.gpus_per_replica},
        logging_config={"log_level": "WARNING", "enable_access_log": False},
        **scale,
    )
    return deployment.bind(spec)


def deploy(spec: LiveSpec) -> str:
    """Runs the application on the connected cluster, and returns its address once it answers.

    Raises `UsageError` when another live policy is on the cluster, `RunFailed` when no replica came up.
    """
    from ray import serve

    section = spec.config.serve
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    _refuse_another(spec)
    if spec.config.feedback.enabled:
        open_to_write(spec.feedback[0]).dispose()  # A database that cannot be opened is told before anything starts.
    serve.start(http_options={"host": section.host, "port": section.port}, logging_config={"log_level": "WARNING"})
    try:
        serve.run(application(spec), name=spec.name, route_prefix="/")
    except RuntimeError as error:
        fix = "See the replica's log in Ray's session folder (logs/serve); `rollcast doctor` checks engine and memory."
        raise RunFailed("No replica of the live policy came up.", str(error), fix) from error
    return f"http://{section.host}:{section.port}"


def remove(spec: LiveSpec) -> None:
    """Takes the application off the cluster."""
    from ray import serve

    serve.delete(spec.name)
    feedback_actor.stop(_writer_of(spec), namespace=spec.namespace)


def _writer_of(spec: LiveSpec) -> str:
    return f"feedback-{spec.run.name}"


def _desk(spec: LiveSpec) -> feedback_actor.FeedbackDesk | None:
    """Of the one writer of the run, which outlives the replica that happened to start it."""
    if not spec.config.feedback.enabled:
        return None
    return feedback_actor.start(
        _writer_of(spec), *spec.feedback, spec.node, namespace=spec.namespace, lifetime="detached"
    )


def spec_of(config: RunConfig, run: Path, namespace: str, version: int | None = None) -> LiveSpec:
    """With settings that every node can read: paths made absolute, the engine's arguments put together."""
    serving = config.serve
    keys = None if serving.keys_file is None else str(Path(serving.keys_file).expanduser().absolute())
    arguments = {**config.rollout.engine_args, **serving.engine_args} if config.rollout.engine == "vllm" else {}
    config = config.model_copy(
        update={
            "serve": serving.model_copy(update={"keys_file": keys}),
            "rollout": config.rollout.model_copy(update={"engine_args": arguments}),
        }
    )
    node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else None
    return LiveSpec(config, run, cluster.compute_dtype(config), namespace, version, node)


def served_there() -> list[str]:
    """Names of the applications on the connected cluster."""
    from ray import serve

    return list(serve.status().applications)


def _refuse_another(spec: LiveSpec) -> None:
    others = [name for name in served_there() if name != spec.name]
    if others:
        what = f"Another application is served on this cluster: {', '.join(others)}."
        raise UsageError(what, "A cluster has one HTTP address.", "End that one, or use another cluster.")
