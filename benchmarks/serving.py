"""The live policy under load: what HTTP adds to the engine, updates under 32 clients, a burst, and cut streams.

    python benchmarks/serving.py [--seconds 60] [--clients 32] [--model FOLDER] [--write]

A run is served by Ray Serve behind HAProxy, with vLLM on this machine; policies are published into the weight store, as
a trainer does it. What HTTP adds is measured against the same engine in this process, in turns. Prints one JSON object.
"""

import argparse
import asyncio
import os
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import Any

os.environ["RAY_SERVE_ENABLE_HA_PROXY"] = "1"  # Before Serve is imported.

import httpx
from measuring import ROOT, finish, machine

from rollcast.demo import prepare_model

TOKENS = 16
ASK = [{"role": "user", "content": "What is the capital of France?"}]
BURST = 10
"""Times as many clients as can be answered and wait."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="of each load, with and without updates")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--every", type=float, default=2.0, help="seconds between two updates")
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "smollm2-135m-instruct")
    parser.add_argument("--engine", choices=("vllm", "torch"), default="vllm")
    parser.add_argument("--write", action="store_true", help="also write benchmarks/results/serving-DATE.json")
    options = parser.parse_args()
    if not options.model.exists():
        prepare_model(options.model)
    with tempfile.TemporaryDirectory(prefix="rollcast-bench-") as folder:
        told = machine()
        with served(Path(folder), options.model, options.engine) as live:
            figures = asyncio.run(measure(live, options))
    finish("serving", {**told, "engine": options.engine, "model": options.model.name, **figures}, options.write)


class Live:
    """The served run, and a trainer that only publishes."""

    def __init__(self, config: Any, run: Path) -> None:
        import ray
        from safetensors.torch import load_file

        from rollcast.control import Line
        from rollcast.weights import Store
        from rollcast_learners.arena import Arena, policy_specs

        self.config = config
        self.url = f"http://127.0.0.1:{config.serve.port}"
        self.store = Store(run.name, ray.get_runtime_context().get_node_id(), 0)
        self.line = Line(run.name, "a benchmark")
        self._tensors = load_file(Path(config.model.path) / "model.safetensors")
        self._arena = Arena(self.store.folder, policy_specs(self._tensors))
        self._versions = 0

    def publish(self) -> int:
        """The same policy under the next version, as a run publishes it: what is timed is the update."""
        from rollcast_learners.types import Weights

        version = self._versions
        for old in self.store.free(version - 1):
            self._arena.retire(old)
        segments, manifest = self._arena.write(version, self._tensors)
        weights = Weights("full", version, manifest, segments, self.store.home, self.store.folder)
        self.line.announce(weights, self.store.handle(self._arena.specs))
        self._versions += 1
        return version

    def close(self) -> None:
        self._arena.close()
        self.store.close()
        self.line.close()


@contextmanager
def served(folder: Path, model: Path, engine: str) -> Iterator[Live]:
    import ray

    from rollcast.cluster import ENVIRONMENT, NAMESPACE
    from rollcast.config_file import load_config
    from rollcast.live import app
    from rollcast.rundir import RunDir

    os.environ |= {f"RAY_SERVE_HAPROXY_{name}_PORT": str(free_port()) for name in ("METRICS", "STATS")}
    settings = (f"--model.path={model}", f"--run.dir={folder}", "--run.name=served", f"--rollout.engine={engine}")
    limits = ("requests_per_s=1e6", "burst=1000000", "tokens_per_minute=1000000000", "concurrent=100000")
    words = [*settings, f"--serve.port={free_port()}", *(f"--serve.limits.{limit}" for limit in limits)]
    config = load_config(ROOT / "deploy" / "configs" / "scripted.toml", [*words, "--serve.cpus_per_replica=2"])
    run = RunDir(folder / "served")
    run.create()
    ray.init(
        address="local",
        num_cpus=4,
        namespace=NAMESPACE,
        include_dashboard=False,
        logging_level="ERROR",
        log_to_driver=False,
        runtime_env={"env_vars": ENVIRONMENT},
    )
    try:
        with closing(Live(config, run.path)) as live:
            live.publish()
            app.deploy(app.spec_of(config, run.path, NAMESPACE))
            yield live
    finally:
        ray.shutdown()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def measure(live: Live, options: argparse.Namespace) -> dict[str, Any]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx.AsyncClient(base_url=live.url, timeout=120, limits=limits) as client:
        await ask(client)
        figures = {"one_client": await one_client(live, client)}
        quiet = await load(live, client, options.clients, options.seconds, None)
        updated = await load(live, client, options.clients, options.seconds, options.every)
        figures["quiet"], figures["updated"] = quiet, updated
        allowed = quiet["p99_s"] + updated["longest_load_s"] + 0.25
        figures["p99_allowed_s"] = round(allowed, 3)
        figures["p99_holds"] = updated["p99_s"] <= allowed
        figures["burst"] = await burst(live, client, quiet["p50_s"])
        figures["cut"] = await cut(client, options.clients)
    return figures


async def ask(client: httpx.AsyncClient, tokens: int = TOKENS) -> httpx.Response:
    body = {"model": "policy", "messages": ASK, "max_tokens": tokens, "temperature": 0}
    return await client.post("/v1/chat/completions", json=body)


async def one_client(live: Live, client: httpx.AsyncClient, rounds: int = 12, each: int = 5) -> dict[str, Any]:
    """What HTTP, HAProxy, the gate and the text cost, over the engine alone in this process."""
    from rollcast.chat import ChatCodec
    from rollcast.cluster import compute_dtype
    from rollcast.engines import start_engine
    from rollcast.sampler import Drawing

    codec = ChatCodec.of(live.config.model)
    size = {"concurrency": 64, "threads": 2, "version": 0}
    engine = await start_engine(live.config, compute_dtype(live.config), codec, None, **size)
    prompt = codec.converse([("user", ASK[0]["content"])])

    async def bare(number: int) -> None:
        async for _ in engine.stream(prompt, Drawing(0.0, TOKENS), f"bare-{number}"):
            pass

    times: dict[str, list[float]] = {"bare": [], "http": []}
    pairs = []
    try:
        for number in range(rounds * each):
            for name in ("bare", "http"):
                began = time.perf_counter()
                if name == "bare":
                    await bare(number)
                else:
                    (await ask(client)).raise_for_status()
                times[name].append(time.perf_counter() - began)
            pairs.append(times["http"][-1] - times["bare"][-1])
    finally:
        await engine.close()
    first = each  # The first ones warm up caches on both sides.
    medians = {f"{name}_p50_ms": round(1e3 * median(values[first:]), 2) for name, values in times.items()}
    added = round(medians["http_p50_ms"] - medians["bare_p50_ms"], 2)
    return {**medians, "added_p50_ms": added, "median_of_pairs_ms": round(1e3 * median(pairs[first:]), 2)}


async def load(
    live: Live, client: httpx.AsyncClient, clients: int, seconds: float, every: float | None
) -> dict[str, Any]:
    """Clients that ask without a pause; with `every`, a new version so often."""
    until = time.monotonic() + seconds
    codes: Counter[int] = Counter()
    times: list[float] = []
    broken = mixed = 0

    async def talk() -> None:
        nonlocal broken, mixed
        while time.monotonic() < until:
            began = time.perf_counter()
            answer = await ask(client)
            codes[answer.status_code] += 1
            if answer.status_code == 200:
                times.append(time.perf_counter() - began)
                spans = answer.json()["policy_versions"]
                broken += spans[0]["start"] != 0 or any(a["end"] != b["start"] for a, b in pairwise(spans))
                mixed += len(spans) > 1

    loads: list[float] = []
    versions = 0

    async def update() -> None:
        nonlocal versions
        due = time.monotonic()
        while every is not None and (due := due + every) < until:
            await asyncio.sleep(due - time.monotonic())  # At once where the update before took longer.
            version = await asyncio.to_thread(live.publish)
            told: dict[str, Any] = {"policy_version": -1}
            while told["policy_version"] < version and time.monotonic() < until:
                await asyncio.sleep(0.1)
                told = (await client.get("/v1/policy")).json()
            loads.append(told.get("load_s", 0.0))
            versions += 1

    await asyncio.gather(update(), *[talk() for _ in range(clients)])
    cuts = quantiles(times, n=100)
    return {
        "clients": clients,
        "seconds": seconds,
        "answers": {str(code): count for code, count in sorted(codes.items())},
        "p50_s": round(median(times), 3),
        "p99_s": round(cuts[98], 3),
        "tokens_per_s": round(TOKENS * len(times) / seconds, 1),
        "updates": versions,
        "longest_load_s": round(max(loads, default=0.0), 3),
        "answers_of_two_versions": mixed,
        "broken_spans": broken,
    }


async def burst(live: Live, client: httpx.AsyncClient, usual_s: float) -> dict[str, Any]:
    """Ten times what can be answered and wait, at once; then single requests until one is as fast as before."""
    limits = live.config.serve.limits
    count = BURST * limits.ongoing
    began = time.perf_counter()
    answers = await asyncio.gather(*[ask(client, 4) for _ in range(count)])
    seconds = time.perf_counter() - began
    ended = time.perf_counter()
    while True:
        asked = time.perf_counter()
        answer = await ask(client)
        if answer.status_code == 200 and time.perf_counter() - asked <= 2 * usual_s:
            break
    refused = [answer for answer in answers if answer.status_code == 429]
    return {
        "requests": count,
        "answers": {str(c): n for c, n in sorted(Counter(answer.status_code for answer in answers).items())},
        "without_retry_after": sum("retry-after" not in answer.headers for answer in refused),
        "seconds": round(seconds, 2),
        "recovered_s": round(time.perf_counter() - ended, 3),
    }


async def cut(client: httpx.AsyncClient, count: int) -> dict[str, Any]:
    """Streams that their clients leave: how long until no answer is at work."""
    body = {"model": "policy", "messages": ASK, "max_tokens": 256, "stream": True, "temperature": 1}

    async def begin() -> None:
        async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            await anext(answer.aiter_lines())

    await asyncio.gather(*[begin() for _ in range(count)])
    left = time.perf_counter()
    while (await client.get("/v1/policy")).json()["answering"]:
        await asyncio.sleep(0.02)
    return {"streams": count, "freed_s": round(time.perf_counter() - left, 3)}


if __name__ == "__main__":
    sys.exit(main())
