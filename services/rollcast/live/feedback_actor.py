"""The feedback writer as a Ray actor: one of each name, and what replicas and the ingress hold of it.

Owns: the actor's options, and how its failures are told. Does not know databases or HTTP.
"""

from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rollcast.live.feedback import FeedbackReceipt, FeedbackRequest, ServedAnswer, answer_id, unavailable
from rollcast.live.feedback_writer import FeedbackWriter
from rollcast.live.keys import Key
from rollcast.live.openai_errors import ApiError
from rollcast.live.protocol import ChatRequest, CompletionRequest
from rollcast.live.told import Record

MEMORY = 256 * 2**20
"""Bytes; at rest it is 147 MiB, most of it Python and the libraries."""


class FeedbackDesk:
    """Where a replica hands in what it answered, and the ingress what people said. It may be sent between actors."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def record(self, *answers: ServedAnswer) -> None:
        """Hands answers in, and waits for nothing. An answer whose writer is just being restarted is not kept."""
        self.actor.record.remote(answers)

    def answered(self, record: Record, asked: ChatRequest | CompletionRequest, key: Key) -> None:
        """Hands in what the live policy answered (`routes.Recorder`)."""
        self.record(*served_answers(record, asked, key))

    async def give(self, request: FeedbackRequest, key: Key) -> FeedbackReceipt:
        """Keeps what the holder of `key` says. Raises `ApiError`: 404, 400, or 503 where it cannot be kept now."""
        try:
            receipt: FeedbackReceipt = await self.actor.give.remote(request, key.id, key.allows("admin"))
        except RayTaskError as error:
            if isinstance(error.cause, ApiError):
                raise error.cause from None
            raise
        except RayActorError:
            raise unavailable("its writer is being restarted") from None
        return receipt

    async def figures(self) -> dict[str, int | str | None]:
        """As `FeedbackWriter.figures`."""
        found: dict[str, int | str | None] = await self.actor.figures.remote()
        return found


def start(
    name: str, url: str, keep_days: float, max_mib: float, node: str | None = None, **options: Any
) -> FeedbackDesk:
    """The desk of the one writer of this name. When it is made, `options` go to the actor, and it is made on `node`
    while that lives, since its database may be a file there.

    Raises Ray's error with the cause when the database cannot be opened. What waits in a writer that is killed, at most
    half a second of answers, is lost; feedback that was acknowledged is not.
    """
    # Ray heeds a wish for a node only of an actor that needs something: memory, as a head may lend no CPU.
    near = {} if node is None else {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=True)}
    usual = {"num_cpus": 0, "memory": MEMORY, "max_restarts": -1, "max_concurrency": 1000, "get_if_exists": True}
    actor = ray.remote(FeedbackWriter).options(name=name, **usual | near | options).remote(url, keep_days, max_mib)
    ray.get(actor.figures.remote())
    return FeedbackDesk(actor)


def stop(name: str, **where: Any) -> None:
    """Writes what waits, and ends the writer of this name, if there is one; `where` says in which namespace."""
    try:
        actor = ray.get_actor(name, **where)
    except ValueError:
        return
    ray.get(actor.close.options(max_task_retries=3).remote())
    ray.kill(actor)


def served_answers(record: Record, asked: ChatRequest | CompletionRequest, key: Key) -> list[ServedAnswer]:
    """The answers of one response, each by the id that feedback names it by."""
    if isinstance(asked, ChatRequest):
        prompt: list[dict[str, Any]] | str = [{"role": role, "content": text} for role, text in asked.turns]
    else:
        prompt = asked.text
    return [
        ServedAnswer(
            id=answer_id(record.id, number),
            time=record.created,
            key=key.id,
            prompt=prompt,
            text=answer.text,
            prompt_ids_P=np.array(record.prompt_ids, np.int32),
            answer_ids_A=np.array(answer.token_ids, np.int32),
            logprobs_A=np.array(answer.logprobs, np.float32),
            spans=answer.spans,
            temperature=record.temperature,
            finish_reason=str(answer.finish_reason),
        )
        for number, answer in enumerate(record.answers)
    ]
