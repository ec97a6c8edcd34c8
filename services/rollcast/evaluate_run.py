"""`rollcast eval`: a saved policy answers a split greedily, in this process and without Ray.

Owns: which policy is measured, its engine for that time, and the figures as a table. Does not know how the policy was
saved (`export.py`), which questions a split has (`evaluate.py`) or how an episode is played (`episode.py`).
"""

import asyncio
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from rollcast.chat import ChatCodec
from rollcast.cluster import ENVIRONMENT, compute_dtype
from rollcast.config import EnvSection, EvalSection, RunConfig
from rollcast.display import harmless, table
from rollcast.engine_traces import engine_record
from rollcast.environments import EnvironmentPool, register_environments
from rollcast.episode import EpisodeLimits, play
from rollcast.errors import RunFailed, UsageError
from rollcast.evaluate import evaluation_prompts, figures, repeated
from rollcast.export import Exported, Report, Which, export
from rollcast.runs import Source
from rollcast.sampler import Sampler
from rollcast.weights import owned_folder
from rollcast_learners.types import Prompt, Sampling, Trajectory


@dataclass(frozen=True)
class Measured:
    """Which policy was asked what, and how it did. `step` is None for published weights without a checkpoint."""

    run: str
    step: int | None
    policy_version: int
    split: str
    asked: int
    errors: int
    first_error: str | None
    figures: dict[str, float]
    """As in metrics.jsonl: `eval/<env>/<metric>` and `eval_kind/<env>/<kind>/<metric>`."""
    signatures: dict[str, str]
    """How each corpus metric was computed, in its library's words."""
    counts: dict[str, int]
    """Greedy answers by `<env>/<kind>`."""


@dataclass(frozen=True)
class Asked:
    """What to measure. Command line -> `evaluate_run`."""

    env: str | None
    """Environment to play, by its id or by its name in the run; None for the run's own."""
    split: str
    samples: int
    """Questions of each environment; 0 for the whole split."""
    sampled: int
    """Further answers to each question at the run's temperature."""
    which: Which | None


def evaluate_run(source: Source, config: RunConfig, asked: Asked, report: Report) -> Measured:
    """Plays the split with the run's engine.

    Raises `UsageError` for an engine without a model, `RunFailed` when no episode ended well.
    """
    if config.rollout.engine == "scripted":
        raise UsageError(
            f"The run {source.run.path.name} samples from a script.",
            "rollout.engine is scripted: its answers do not come from the policy.",
            "Measure the policy with another engine: --rollout.engine torch, or vllm.",
        )
    os.environ.update({name: value for name, value in ENVIRONMENT.items() if name not in os.environ})
    questions = _questions(config, asked)
    with tempfile.TemporaryDirectory(prefix="rollcast-eval-") as folder:
        policy = export(source, Path(folder) / "policy", asked.which, config, report)
        with _ended_by_sigterm():
            answers, sampled = asyncio.run(_play(config, policy, questions, asked.sampled, report))
    return _measured(policy, asked.split, answers, sampled)


def _questions(config: RunConfig, asked: Asked) -> list[Prompt]:
    register_environments()
    settings = EvalSection(split=asked.split, samples=asked.samples)
    try:
        return evaluation_prompts(_environments(config, asked.env), settings)
    except (ValueError, TypeError) as error:
        fix = "Correct --split, or the arguments: --env.0.kwargs.KEY VALUE."
        what = f"The split {asked.split!r} cannot be played."
        raise UsageError(what, f"The environment says: {error}", fix) from error


def _environments(config: RunConfig, env: str | None) -> Sequence[EnvSection]:
    """The one asked for, made as the run makes it if the run plays it."""
    if env is None:
        return config.env
    played = [section for section in config.env if env in (section.label, section.id)]
    return played[:1] or [EnvSection(id=env)]


def _measured(policy: Exported, split: str, answers: Sequence[Trajectory], sampled: Sequence[Trajectory]) -> Measured:
    errors = [answer.error for answer in answers if answer.error is not None]
    if len(errors) == len(answers):
        cause = f"The first failure was: {errors[0]}" if errors else "The split holds no questions."
        raise RunFailed("No episode ended well.", cause, "Mend the environment, or ask another with --env.")
    counts: dict[str, int] = {}
    for answer in answers:
        if answer.error is None:
            place = f"{answer.prompt.label}/{answer.kind}"
            counts[place] = counts.get(place, 0) + 1
    found = figures(answers, sampled)
    return Measured(
        run=policy.run,
        step=policy.step,
        policy_version=policy.policy_version,
        split=split,
        asked=len(answers),
        errors=len(errors),
        first_error=errors[0] if errors else None,
        figures=found.values,
        signatures=found.signatures,
        counts=dict(sorted(counts.items())),
    )


# ---- playing


async def _play(
    config: RunConfig, policy: Exported, questions: Sequence[Prompt], times: int, report: Report
) -> tuple[list[Trajectory], list[Trajectory]]:
    """Greedy answers, and `times` sampled ones to each question."""
    rollout = config.rollout
    codec = ChatCodec.from_folder(policy.path, config.model.trust_remote_code, config.model.chat_template)
    pool = EnvironmentPool(rollout.env_timeout_s, rollout.max_turns)
    limits = EpisodeLimits(rollout.max_turns, rollout.max_attempts)
    restricted = config.eval.restrict_answers
    greedy = Sampling(0.0, rollout.max_new_tokens, restricted)
    drawn = Sampling(rollout.temperature, rollout.max_new_tokens, restricted)
    free = asyncio.Semaphore(rollout.concurrency)
    report(f"starting the {rollout.engine} engine with policy version {policy.policy_version}")
    async with _engine(config, policy) as sampler:
        report(f"asking {len(questions)} questions")

        async def ask(prompt: Prompt, sampling: Sampling) -> Trajectory:
            async with free:
                return await play(prompt, pool, sampler, codec, sampling, limits)

        try:
            answers = await asyncio.gather(*[ask(prompt, greedy) for prompt in questions])
            sampled = await asyncio.gather(*[ask(prompt, drawn) for prompt in repeated(questions, times)])
            return list(answers), list(sampled)
        finally:
            pool.close()


@asynccontextmanager
async def _engine(config: RunConfig, policy: Exported) -> AsyncIterator[Sampler]:
    """The run's engine on the exported folder."""
    rollout, dtype = config.rollout, compute_dtype(config)
    sampler: Sampler
    if rollout.engine == "torch":
        from rollcast.torch_sampler import TorchSampler

        sampler = TorchSampler(policy.path, dtype, rollout.max_model_len, config.model.trust_remote_code)
        sampler.version = policy.policy_version
        try:
            yield sampler
        finally:
            await sampler.close()
        return
    from rollcast.vllm_sampler import VllmSampler

    with owned_folder("eval") as folder:
        sampler = await VllmSampler.start(
            policy.path,
            policy.policy_version,
            dtype=dtype,
            max_model_len=rollout.max_model_len,
            concurrency=rollout.concurrency,
            tensor_parallel=rollout.tensor_parallel,
            threads=len(os.sched_getaffinity(0)),
            structured=config.eval.restrict_answers,
            engine_args=rollout.engine_args,
            record=folder / engine_record("eval"),
        )
        try:
            yield sampler
        finally:
            await sampler.close()


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the engine too; by default it would end this process alone."""

    def leave(*_: Any) -> None:
        sys.exit(128 + signal.SIGTERM)

    before: Callable[..., Any] | int | None = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# ---- telling it


def show(found: Measured, console: Console) -> None:
    """Metrics by kind of question, one table for each environment."""
    step = "" if found.step is None else f", step {found.step}"
    console.print(f"{found.run}{step}, policy version {found.policy_version}: split {found.split}, greedy answers")
    for env in dict.fromkeys(place.partition("/")[0] for place in found.counts):
        _show_environment(found, env, console)
    for name, signature in found.signatures.items():
        console.print(f"{name.removeprefix('eval/')}: {signature}", soft_wrap=True)
    if found.errors:
        console.print(f"{found.errors} of {found.asked} episodes failed and are not counted; the first:")
        console.print(harmless(str(found.first_error)))


def _show_environment(found: Measured, env: str, console: Console) -> None:
    whole = _below(f"eval/{env}/", found.figures)
    counts = {place.partition("/")[2]: count for place, count in found.counts.items() if place.startswith(f"{env}/")}
    columns = ("answered", *whole)
    shown = table(console, env, *columns, right=columns)
    for kind, count in counts.items():
        if kind:
            of_kind = _below(f"eval_kind/{env}/{kind}/", found.figures)
            shown.add_row(harmless(kind), str(count), *(f"{of_kind[m]:.3f}" if m in of_kind else "" for m in whole))
    shown.add_section()
    shown.add_row("all", str(sum(counts.values())), *(f"{value:.3f}" for value in whole.values()))
    console.print(shown)


def _below(prefix: str, rows: dict[str, float]) -> dict[str, float]:
    return {name.removeprefix(prefix): value for name, value in rows.items() if name.startswith(prefix)}
