"""Gymnasium environments off the event loop, each call with a deadline.

Owns: making, reusing and abandoning environments, and checking what they return. Does not know tokens or
policies.

An environment is anybody's code: it may raise, hang, or return nonsense. All of that becomes
`EnvironmentFailed`, which the episode turns into data. A call that hangs cannot be stopped; its thread and
its environment are left behind.
"""

import asyncio
import json
import math
import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any, TypeVar

import gymnasium
import numpy as np

from rollcast_learners.types import Prompt

T = TypeVar("T")


class EnvironmentFailed(RuntimeError):
    """One episode is lost, and why."""


@dataclass(frozen=True)
class StepResult:
    """What `env.step` returned, checked."""

    observation: str
    reward: float
    terminated: bool
    truncated: bool
    info: dict[str, Any]


@cache
def register_environments() -> None:
    """Makes the built-in environments known to Gymnasium, and those of installed packages."""
    import rollcast_envs  # noqa: F401  (importing it registers them)

    for plugin in entry_points(group="rollcast.envs"):
        loaded = plugin.load()
        if callable(loaded):
            loaded()


def make_environment(
    env_id: str, kwargs: Mapping[str, Any], scoring: Mapping[str, Any] | None = None, max_turns: int | None = None
) -> Any:
    """The environment as a run plays it: with the reward functions that the run adds, if any.

    They are computed on the step that ends an episode, so the run's limit of turns has to end it inside.
    """
    env = gymnasium.make(env_id, **kwargs)
    if scoring is None:
        return env
    from rollcast_envs.rewarded import RewardedEnv

    limited = env if max_turns is None else gymnasium.wrappers.TimeLimit(env, max_turns)
    return RewardedEnv(limited, scoring["rewards"], scoring.get("own_weight", 1.0))


class _Raised(Exception):
    """Carries what an environment raised; on its own, asyncio would take some of it for its own signals."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error


class _Thread:
    """One thread that runs calls one after the other; a daemon, since a hung call must not block the exit."""

    def __init__(self) -> None:
        self.calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True, name="environment").start()

    def _run(self) -> None:
        while (call := self.calls.get()) is not None:
            call()

    async def call(self, function: Callable[[], T], timeout_s: float) -> T:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def settle(result: T | None, error: _Raised | None) -> None:
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)  # type: ignore[arg-type]

        def run() -> None:
            result: T | None = None
            raised: _Raised | None = None
            try:
                result = function()
            except BaseException as error:  # Other people's code: all that it raises is data, SystemExit too.
                raised = _Raised(error)
            with suppress(RuntimeError):  # The loop is closed: a call that hung came back after everything.
                loop.call_soon_threadsafe(settle, result, raised)

        self.calls.put(run)
        return await asyncio.wait_for(future, timeout_s)

    def close(self) -> None:
        self.calls.put(None)


class Environment:
    """One environment on one thread. After `EnvironmentFailed` it is not to be used again."""

    def __init__(
        self,
        env_id: str,
        kwargs: dict[str, Any],
        timeout_s: float,
        scoring: Mapping[str, Any] | None = None,
        max_turns: int | None = None,
    ) -> None:
        self.env_id = env_id
        self.kwargs = kwargs
        self.timeout_s = timeout_s
        self.scoring = scoring
        self.max_turns = max_turns
        self.system_prompt: str | None = None
        self.few_shot: Sequence[tuple[str, str]] = ()
        self.tools: Sequence[Mapping[str, Any]] = ()
        self.choices: Sequence[str] | None = None
        self._thread = _Thread()
        self._env: Any = None

    async def open(self) -> None:
        await self._call("make", self._make)

    async def reset(self, seed: int, options: dict[str, Any] | None) -> tuple[str, dict[str, Any]]:
        return await self._call("reset", lambda: self._reset(seed, options))

    async def step(self, answer: str) -> StepResult:
        return await self._call("step", lambda: _checked_step(self._env.step(answer)))

    def close(self) -> None:
        """Lets the thread end after the call in flight, if that ever returns."""
        self._thread.calls.put(self._close)
        self._thread.close()

    def _make(self) -> None:
        self._env = make_environment(self.env_id, self.kwargs, self.scoring, self.max_turns)
        self._look()

    def _reset(self, seed: int, options: dict[str, Any] | None) -> tuple[str, dict[str, Any]]:
        result = _checked_reset(self._env.reset(seed=seed, options=options))
        self._look()
        return result

    def _look(self) -> None:
        """How the episode opens: an environment may say that anew at each reset."""
        env = self._env.unwrapped
        self.system_prompt = getattr(env, "system_prompt", None)
        if self.system_prompt is not None:
            _check(_is_text(self.system_prompt), self.system_prompt, "a string or None as the system_prompt")
        self.few_shot = [tuple(pair) for pair in getattr(env, "few_shot", ())]
        pairs = all(len(pair) == 2 and all(map(_is_text, pair)) for pair in self.few_shot)
        _check(pairs, self.few_shot, "pairs of strings as few_shot")
        self.tools = tuple(getattr(env, "tools", ()))
        choices = getattr(env, "choices", None)
        self.choices = None if choices is None else tuple(choices)

    def _close(self) -> None:
        with suppress(BaseException):  # It is being thrown away: how it takes that is of no interest.
            if self._env is not None:
                self._env.close()

    async def _call(self, name: str, function: Callable[[], T]) -> T:
        try:
            return await self._thread.call(function, self.timeout_s)
        except TimeoutError as error:
            late = f"{self.env_id}: {name} did not return within {self.timeout_s:g} s"
            raise EnvironmentFailed(late) from error
        except _Raised as raised:
            cause = raised.error
            what = "returned" if isinstance(cause, _Nonsense) else f"raised {type(cause).__name__}:"
            raise EnvironmentFailed(f"{self.env_id}: {name} {what} {cause}") from cause


class _Nonsense(ValueError):
    """An environment returned what it may not."""


def _checked_reset(result: Any) -> tuple[str, dict[str, Any]]:
    _check(isinstance(result, tuple) and len(result) == 2, result, "(str, dict)")
    observation, info = result
    _check_text_and_info(observation, info)
    return observation, info


def _checked_step(result: Any) -> StepResult:
    _check(isinstance(result, tuple) and len(result) == 5, result, "(str, float, bool, bool, dict)")
    observation, reward, terminated, truncated, info = result
    _check_text_and_info(observation, info)
    _check(_is_finite_number(reward), reward, "a finite number as the reward")
    for name, flag in (("terminated", terminated), ("truncated", truncated)):
        _check(isinstance(flag, bool | np.bool_), flag, f"a bool as {name}")
    return StepResult(observation, float(reward), bool(terminated), bool(truncated), info)


def _check_text_and_info(observation: Any, info: Any) -> None:
    _check(_is_text(observation), observation, "a string of valid Unicode as the observation")
    _check(isinstance(info, dict), info, "a dict as info")
    for key in ("metrics", "rewards", "reward_seconds"):
        figures = info.get(key, {})
        numbers = isinstance(figures, dict) and all(_is_finite_number(value) for value in figures.values())
        _check(numbers, figures, f"finite numbers by name as info[{key!r}]")
    references = info.get("references", ())
    texts = isinstance(references, list | tuple) and all(_is_text(text) for text in references)
    _check(texts, references, "a list of strings as info['references']")


def _check(right: bool, value: object, expected: str) -> None:
    if not right:
        raise _Nonsense(f"{repr(value)[:80]}; expected {expected}")


def _is_text(value: object) -> bool:
    """A lone surrogate is no character, and no tokenizer takes it."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_finite_number(value: object) -> bool:
    try:
        return not isinstance(value, str | bytes) and math.isfinite(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return False


class EnvironmentPool:
    """Environments that finished an episode well are used again."""

    def __init__(self, timeout_s: float, max_turns: int | None = None) -> None:
        register_environments()
        self.timeout_s = timeout_s
        self.max_turns = max_turns
        self._idle: dict[str, list[Environment]] = defaultdict(list)

    async def acquire(self, prompt: Prompt) -> Environment:
        idle = self._idle[self._key(prompt.env_id, prompt.kwargs, prompt.scoring)]
        if idle:
            return idle.pop()
        environment = Environment(prompt.env_id, dict(prompt.kwargs), self.timeout_s, prompt.scoring, self.max_turns)
        try:
            await environment.open()
        except BaseException:  # Also a cancelled one: its thread must not stay behind.
            environment.close()
            raise
        return environment

    def release(self, environment: Environment) -> None:
        self._idle[self._key(environment.env_id, environment.kwargs, environment.scoring)].append(environment)

    def close(self) -> None:
        for idle in self._idle.values():
            for environment in idle:
                environment.close()
        self._idle.clear()

    @staticmethod
    def _key(env_id: str, kwargs: Mapping[str, Any], scoring: Mapping[str, Any] | None) -> str:
        return json.dumps([env_id, dict(kwargs), scoring], sort_keys=True, default=repr)
