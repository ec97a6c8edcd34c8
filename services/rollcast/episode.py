"""One episode: `play` takes a prompt, an environment and a sampler, and returns a complete trajectory.

Owns: the conversation between environment and policy, and the token streams it leaves. Does not know Ray,
torch, any engine, or how trajectories are trained on.
"""

from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from rollcast.chat import ChatCodec, Conversation
from rollcast.environments import Environment, EnvironmentFailed, EnvironmentPool, StepResult
from rollcast.sampler import Sampler
from rollcast_learners.types import Completion, Prompt, Sampling, Stream, Trajectory, Turn, VersionSpan


class PromptTooLong(ValueError):
    """A prompt does not fit the engine's context; trying again would not help."""


@dataclass
class _StreamBuilder:
    """A token stream while it grows."""

    token_ids: list[int] = field(default_factory=list)
    trained: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    spans: list[VersionSpan] = field(default_factory=list)

    def ask(self, token_ids: list[int]) -> None:
        self.token_ids += token_ids
        self.trained += [False] * len(token_ids)
        self.logprobs += [0.0] * len(token_ids)

    def answer(self, completion: Completion) -> None:
        start = len(self.token_ids)
        self.token_ids += completion.token_ids_T.tolist()
        self.trained += [True] * len(completion.token_ids_T)
        self.logprobs += completion.logprobs_T.tolist()
        self.spans += [VersionSpan(s.version, s.start + start, s.end + start) for s in completion.spans]

    def build(self) -> Stream:
        return Stream(
            np.array(self.token_ids, np.int32),
            np.array(self.trained, np.bool_),
            np.array(self.logprobs, np.float32),
            tuple(self.spans),
        )


@dataclass
class _Episode:
    """Everything an episode has left so far; becomes a trajectory whether or not it ended well."""

    prompt: Prompt
    streams: list[_StreamBuilder] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    terminated: bool = False
    truncated: bool = False
    metrics: dict[str, float] = field(default_factory=dict)
    kind: str = ""
    references: tuple[str, ...] = ()
    parts: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    reward_seconds: dict[str, float] = field(default_factory=dict)
    reward_error: str | None = None

    def record(self, observation: str, answer: str, completion: Completion, result: StepResult) -> None:
        end = len(self.streams[-1].token_ids)
        start = end - len(completion.token_ids_T)
        self.turns.append(
            Turn(
                len(self.streams) - 1,
                start,
                end,
                observation,
                answer,
                result.reward,
                completion.finish_reason,
            )
        )
        self.terminated, self.truncated = result.terminated, result.truncated
        self._take_info(result.info)

    def _take_info(self, info: dict[str, Any]) -> None:
        self.metrics.update({str(k): float(v) for k, v in dict(info.get("metrics", {})).items()})
        self.kind = str(info.get("kind", self.kind))
        self.references = tuple(info.get("references", self.references))
        for name, value in info.get("rewards", {}).items():
            self.parts[name] += float(value)
        self.reward_seconds |= info.get("reward_seconds", {})
        self.reward_error = info.get("reward_error", self.reward_error)

    def trajectory(self, error: str | None = None) -> Trajectory:
        return Trajectory(
            prompt=self.prompt,
            streams=tuple(stream.build() for stream in self.streams),
            turns=tuple(self.turns),
            terminated=self.terminated,
            truncated=self.truncated,
            metrics=self.metrics,
            kind=self.kind,
            error=error or self.reward_error,
            references=self.references,
            parts=dict(self.parts),
            reward_seconds=self.reward_seconds,
        )


@dataclass(frozen=True)
class EpisodeLimits:
    """What an episode may take. Config -> worker."""

    max_turns: int
    max_attempts: int


async def play(
    prompt: Prompt,
    pool: EnvironmentPool,
    sampler: Sampler,
    codec: ChatCodec,
    sampling: Sampling,
    limits: EpisodeLimits,
) -> Trajectory:
    """Plays one episode, afresh in a new environment after a failure, at most `max_attempts` times.

    Never raises for a bad environment or a prompt that is too long: the trajectory's `error` says what
    happened. `EngineDied` passes through, since the engine is not this episode's to judge.
    """
    episode = _Episode(prompt)
    for attempt in range(1, limits.max_attempts + 1):
        episode = _Episode(prompt)
        try:
            environment = await pool.acquire(prompt)
        except EnvironmentFailed as error:
            failure = str(error)
            continue
        try:
            await _converse(episode, environment, sampler, codec, sampling, limits, f"{prompt.id}#{attempt}")
        except EnvironmentFailed as error:
            environment.close()
            failure = str(error)
        except PromptTooLong as error:
            pool.release(environment)
            return episode.trajectory(f"{prompt.env_id}: {error}")
        except BaseException:  # A dead engine, or cancelled in mid-call: nobody will use this environment again.
            environment.close()
            raise
        else:
            pool.release(environment)
            return episode.trajectory()
    return episode.trajectory(f"{failure} (attempt {limits.max_attempts} of {limits.max_attempts})")


async def _converse(
    episode: _Episode,
    environment: Environment,
    sampler: Sampler,
    codec: ChatCodec,
    sampling: Sampling,
    limits: EpisodeLimits,
    request_id: str,
) -> None:
    prompt = episode.prompt
    options = dict(prompt.options) if prompt.options is not None else None
    observation, info = await environment.reset(prompt.seed, options)
    episode._take_info(info)
    conversation, token_ids = codec.open(
        environment.system_prompt, observation, environment.few_shot, environment.tools
    )
    if sampling.restricted and environment.choices:
        sampling = replace(sampling, choices=tuple(environment.choices))
    stream = _StreamBuilder()
    episode.streams.append(stream)
    stream.ask(token_ids)
    for turn in range(limits.max_turns):
        completion = await _sample(sampler, stream.token_ids, sampling, f"{request_id}/{turn}")
        answer = codec.answer(completion.token_ids_T.tolist())
        result = await environment.step(answer)
        stream.answer(completion)
        episode.record(observation, answer, completion, result)
        if result.terminated or (result.truncated and not result.observation):
            return
        # After a truncation too: the critic's value of the state that was left must have seen the last observation.
        conversation, stream = _next_turn(episode, codec, conversation, completion, result)
        if result.truncated:
            return
        observation = result.observation
    episode.truncated = True


def _next_turn(
    episode: _Episode, codec: ChatCodec, conversation: Conversation, completion: Completion, result: StepResult
) -> tuple[Conversation, _StreamBuilder]:
    role = str(result.info.get("role", "user"))
    conversation, suffix = codec.extend(conversation, completion.token_ids_T.tolist(), result.observation, role)
    stream = episode.streams[-1]
    if suffix is None and result.truncated:
        return conversation, stream
    if suffix is None:
        stream = _StreamBuilder()
        episode.streams.append(stream)
        suffix = codec.reopen(conversation)
    stream.ask(suffix)
    return conversation, stream


async def _sample(sampler: Sampler, token_ids: list[int], sampling: Sampling, request_id: str) -> Completion:
    try:
        return await sampler.sample(token_ids, sampling, request_id)
    except ValueError as error:  # The sampler's word for a prompt that does not fit.
        raise PromptTooLong(str(error)) from error
