"""A live policy in this process: a replica with scripted or plain engines, its routes, and a real HTTP server.

Owns: starting it on a free port, publishing policies to it, ending it; and a crowd that asks. Does not know Ray.
"""

import asyncio
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx
import openai
import uvicorn
from safetensors.torch import load_file

from rollcast import best
from rollcast.chat import ChatCodec
from rollcast.live.keys import Keys
from rollcast.live.limits import Limits
from rollcast.live.replica import Replica
from rollcast.live.routes import Fleet, LiveRoutes, Recorder, Served
from rollcast.live.shelf import Shelf
from rollcast.live.sources import RunFolder
from rollcast.live.versions import Alias
from rollcast.rundir import RunDir
from rollcast.sampler import Sampler, ScriptedSampler
from rollcast.weights import save_policy
from rollcast_learners.arena import Arena, policy_specs
from rollcast_learners.types import Weights

T = TypeVar("T")
GENEROUS = Limits(requests_per_s=1e6, burst=10**6, tokens_per_minute=10**12, concurrent=1000)
ASK: Any = [{"role": "user", "content": "Which town lies on the river?"}]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Policies:
    """Publishes policies of a run's folder as its trainer would: a checkpoint's, and one that evaluation found best."""

    def __init__(self, run: RunDir, model: str) -> None:
        self.run = run
        run.create()
        self._arena = Arena(run.path / "arena", policy_specs(self._tensors(model)))
        self._model = model

    def publish(self, version: int, model: str | None = None) -> Weights:
        """Writes `weights/vN`, and removes the one before."""
        segments, manifest = self._arena.write(version, self._tensors(model or self._model))
        weights = Weights("full", version, manifest, segments, "", str(self._arena.folder))
        save_policy(weights, self._arena.folder, self.run.published(version))
        self.run.forget_published_but(version)
        return weights

    def found_best(self, weights: Weights, value: float) -> None:
        """Evaluation says that `weights` are the best so far."""
        said = {"metric": "QA-v0/f1", "value": value, "step": 1, "policy_version": weights.version}
        best.keep(self.run, said, lambda folder: save_policy(weights, self._arena.folder, folder))

    def _tensors(self, model: str) -> dict[str, Any]:
        return load_file(Path(model) / "model.safetensors")


def scripted(codec: ChatCodec, script: Any = None, **settings: Any) -> Callable[[Alias], Awaitable[Sampler]]:
    """Starts scripted engines; each says words of the prompt, or follows `script`."""

    async def start(_: Alias) -> Sampler:
        script_settings = {} if script is None else {"script": script}
        return ScriptedSampler(codec.tokenizer.eos_token_id, **script_settings, **settings)

    return start


class Server:
    """A replica behind a real server, in a thread with an event loop of its own."""

    def __init__(
        self,
        run: RunDir,
        codec: ChatCodec,
        start_engine: Callable[[Alias], Awaitable[Sampler]],
        keys: Keys | None = None,
        limits: Limits = GENEROUS,
        fleet: Fleet | None = None,
        recorder: Recorder | None = None,
        context: int = 512,
    ) -> None:
        self.replica = Replica(codec, start_engine, RunFolder(run, look_every_s=0.02), Shelf(run), 0.08)
        self._made = (LiveRoutes(self.replica, Served(run, context, 500), fleet, recorder), keys, limits)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Server":
        self._thread.start()
        assert self._ready.wait(60) and self.failure is None, self.failure
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(20)

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        """Does `work` on the server's event loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(60)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_until_complete(self._serve())
        except BaseException as error:  # Told to the test, which runs in another thread.
            self.failure = error
        finally:
            self._ready.set()
            self.loop.close()

    async def _serve(self) -> None:
        routes, keys, limits = self._made
        await self.replica.start()
        settings = uvicorn.Config(
            routes.app(keys, limits), "127.0.0.1", self.port, log_level="error", timeout_graceful_shutdown=1
        )
        self._server = uvicorn.Server(settings)
        following = asyncio.ensure_future(self.replica.follow())
        serving = asyncio.ensure_future(self._server.serve())
        while not self._server.started:
            await asyncio.sleep(0.005)
        self._ready.set()
        await serving
        following.cancel()
        await asyncio.wait([following])
        await self.replica.close()


@contextmanager
def running(*arguments: Any, **settings: Any) -> Iterator[Server]:
    """A server for the time of a block."""
    with Server(*arguments, **settings) as server:
        yield server


def generous(**changes: Any) -> Limits:
    """Limits of which only those named can be met."""
    return GENEROUS.model_copy(update=changes)


def client_of(server: Server, **settings: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, **settings)


def said(codec: ChatCodec, text: str) -> Any:
    """A script that says `text`, a byte a token."""

    def script(token_ids: Sequence[int], version: int, draw: random.Random) -> list[int]:
        return codec.plain(text)

    return script


def expected(model: str, codec: ChatCodec, prompt: str, length: int) -> str:
    import torch
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = torch.tensor([codec.plain(prompt)])
    told = plain.generate(ids, max_new_tokens=length, do_sample=False)
    return codec.answer(told[0, ids.shape[1] :].tolist())


def is_up(url: str) -> bool:
    """Serve itself listens before a replica is ready, and lets requests wait."""
    try:
        return httpx.get(f"{url}/healthz").status_code == 200
    except httpx.TransportError:
        return False


class Crowd:
    """Clients that ask without a pause, and what became of each question; 0 is a connection that broke."""

    def __init__(self, url: str, clients: int) -> None:
        self.codes: Counter[int] = Counter()
        self.told: list[list[dict[str, int]]] = []
        self._url = url
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._talk, daemon=True) for _ in range(clients)]

    def __enter__(self) -> "Crowd":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(30)

    def _talk(self) -> None:
        body = {"model": "policy", "messages": ASK, "max_tokens": 40}
        with httpx.Client(base_url=self._url, timeout=30) as client:
            while not self._stop.is_set():
                try:
                    self._note(client.post("/v1/chat/completions", json=body))
                except httpx.TransportError:
                    self.codes[0] += 1
                    time.sleep(0.05)

    def _note(self, answer: httpx.Response) -> None:
        with self._lock:
            self.codes[answer.status_code] += 1
            if answer.status_code == 200:
                self.told.append(answer.json()["policy_versions"])
