"""The live policy's HTTP routes: OpenAI's chat and plain completions, the models, the policy, the fleet.

Owns: what each route does with a `Replica`. Does not know Serve or engines; keys, limits and the form of errors are
`gate.py`'s, requests and answers `protocol.py`'s and `answers.py`'s.
"""

import asyncio
import random
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

from fastapi import FastAPI, Request, Response
from pydantic import Field

from rollcast import metrics
from rollcast.errors import RollcastError
from rollcast.live.answers import ModelCard, ModelList
from rollcast.live.feedback import FeedbackReceipt, FeedbackRequest
from rollcast.live.gate import guard
from rollcast.live.keys import Key, Keys
from rollcast.live.limits import Limits
from rollcast.live.openai_errors import ApiError
from rollcast.live.page import page
from rollcast.live.prompt import prompt_ids
from rollcast.live.protocol import (
    Asked,
    ChatRequest,
    CompletionRequest,
    FleetSize,
    Promote,
    Rollback,
    room_for_answer,
    wanted_version,
)
from rollcast.live.replica import Replica
from rollcast.live.told import Events, Form, OfChat, OfCompletion, Question, Record, Whole
from rollcast.live.versions import NoSuchPolicy, Releases
from rollcast.rundir import RunDir
from rollcast.sampler import Drawing


class Fleet(Protocol):
    """The rollout workers of the run that is served."""

    async def status(self) -> Mapping[str, Any]:
        """What the trainer last said. Raises `RollcastError` when none lives."""

    async def scale(self, workers: int) -> Mapping[str, Any]:
        """Asks for so many workers. Raises `RollcastError` when that cannot be."""


class Canary(Asked):
    """`POST /v1/policy/canary`: the share of what is asked of the best policy that the candidate answers."""

    share: Annotated[float, Field(ge=0, le=1)]
    """0 for none, 1 for all of it."""


class Recorder(Protocol):
    """Whoever keeps what was answered, and what people say of it."""

    def answered(self, record: Record, asked: ChatRequest | CompletionRequest, key: Key) -> None:
        """Called once an answer is whole; must not wait."""

    async def give(self, request: FeedbackRequest, key: Key) -> FeedbackReceipt:
        """Keeps feedback. Raises `ApiError`."""


@dataclass(frozen=True)
class Served:
    """What the routes tell about what they serve, and how much they give."""

    run: RunDir
    context: int
    max_new_tokens: int

    @property
    def name(self) -> str:
        """Of the run."""
        return self.run.path.name


class LiveRoutes:
    """One replica's routes. `app()` makes the FastAPI application."""

    def __init__(
        self, replica: Replica, served: Served, fleet: Fleet | None = None, recorder: Recorder | None = None
    ) -> None:
        self.replica = replica
        self.served = served
        self.fleet = fleet
        self.recorder = recorder
        self._random = random.Random()
        self._started = int(time.time())

    def app(self, keys: Keys | None, limits: Limits) -> FastAPI:
        """Documentation pages are left out: they are routes too."""
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
        app.add_api_route("/v1/chat/completions", self.chat, methods=["POST"], response_model=None)
        app.add_api_route("/v1/completions", self.complete, methods=["POST"], response_model=None)
        app.add_api_route("/v1/feedback", self.feedback, methods=["POST"], response_model=None)
        app.add_api_route("/", self.front, methods=["GET"], response_model=None)
        app.add_api_route("/healthz", self.healthz, methods=["GET"], response_model=None)
        app.add_api_route("/v1/models", self.models, methods=["GET"], response_model=None)
        app.add_api_route("/v1/policy", self.policy, methods=["GET"], response_model=None)
        app.add_api_route("/v1/models/{model}", self.model, methods=["GET"], response_model=None)
        app.add_api_route("/v1/policy/promote", self.promote, methods=["POST"], response_model=None)
        app.add_api_route("/v1/policy/rollback", self.rollback, methods=["POST"], response_model=None)
        app.add_api_route("/v1/policy/canary", self.canary, methods=["POST"], response_model=None)
        app.add_api_route("/v1/fleet", self.fleet_status, methods=["GET"], response_model=None)
        app.add_api_route("/v1/fleet", self.fleet_size, methods=["PUT"], response_model=None)
        guard(app, keys, limits)
        return app

    # ---- answers

    async def chat(self, asked: ChatRequest, request: Request) -> Response:
        return self._answer(asked, OfChat(self._id("chatcmpl"), self.replica.codec), request)

    async def complete(self, asked: CompletionRequest, request: Request) -> Response:
        return self._answer(asked, OfCompletion(self._id("cmpl"), self.replica.codec), request)

    def _answer(self, asked: ChatRequest | CompletionRequest, form: Form, request: Request) -> Response:
        wanted_version(asked.model, self.replica.resident)
        ids = prompt_ids(asked, self.replica.codec, self.served.context)
        room = room_for_answer(asked, len(ids), self.served.context, self.served.max_new_tokens)
        name = asked.model.partition("@")[2] or "latest"
        question = Question(
            self.replica,
            self.replica.engine_for(name, self._random.random()),
            asked.model,
            tuple(ids),
            Drawing(
                1.0 if asked.temperature is None else asked.temperature,
                room,
                1.0 if asked.top_p is None else asked.top_p,
                asked.seed,
                asked.alternatives or 0,
            ),
            asked.stops,
            asked.answers,
            asked.alternatives is not None,
            self._note(asked, request),
        )
        return Events(question, form, asked.wants_usage) if asked.stream else Whole(question, form)

    def _note(self, asked: ChatRequest | CompletionRequest, request: Request) -> Any:
        """What is to be done with an answer once it is over, whole or cut."""
        caller, recorder = request.state.caller, self.recorder

        def note(record: Record) -> None:
            caller.spend(len(record.prompt_ids) + sum(len(answer.token_ids) for answer in record.answers))
            if recorder is not None and record.whole:
                recorder.answered(record, asked, request.state.key)

        return note

    def _id(self, kind: str) -> str:
        return f"{kind}-{uuid.uuid4().hex}"

    async def feedback(self, asked: FeedbackRequest, request: Request) -> FeedbackReceipt:
        if self.recorder is None:
            raise ApiError(404, "answers are not kept here (feedback.enabled = false)", None, "feedback_disabled")
        return await self.recorder.give(asked, request.state.key)

    # ---- what there is

    async def front(self) -> Response:
        content, headers = page()
        return Response(content, headers=headers)

    async def healthz(self) -> dict[str, Any]:
        return {"status": "ok", "policy_version": self.replica.resident["latest"]}

    async def models(self) -> ModelList:
        resident = self.replica.resident
        names = {"policy": resident["latest"], **{f"policy@{alias}": number for alias, number in resident.items()}}
        names |= {f"policy@{number}": number for number in sorted(set(resident.values()))}
        return ModelList(data=[self._card(name, number) for name, number in names.items()])

    async def model(self, model: str) -> ModelCard:
        return self._card(model, wanted_version(model, self.replica.resident))

    def _card(self, name: str, version: int) -> ModelCard:
        return ModelCard(id=name, created=self._started, policy_version=version, max_model_len=self.served.context)

    async def policy(self) -> dict[str, Any]:
        """The newest policy, what is resident, and what was chosen."""
        replica = self.replica
        version = replica.resident["latest"]
        return {
            "run": self.served.name,
            "policy_version": version,
            "step": await self._step(version),
            "age_s": round(time.time() - replica.loaded_at, 3),
            "resident": replica.resident,
            "answering": replica.counts.answering,
            "answered": replica.counts.answered,
            "loads": replica.counts.loads,
            "load_s": round(replica.counts.load_s, 4),
            "refused": replica.counts.refusals[-1] if replica.counts.refusals else None,
            **_told(replica.releases),
        }

    async def _step(self, version: int) -> int | None:
        """The learner step that made the version, where the run's figures name it."""
        rows = await asyncio.to_thread(metrics.read, self.served.run.metrics)
        return next((int(row["step"]) for row in reversed(rows) if row.get("policy_version") == version), None)

    # ---- what is chosen

    async def promote(self, asked: Promote) -> dict[str, Any]:
        return await self._chosen(self.replica.promote(asked.version))

    async def rollback(self, asked: Rollback) -> dict[str, Any]:
        return await self._chosen(self.replica.rollback(asked.version))

    async def canary(self, asked: Canary) -> dict[str, Any]:
        return await self._chosen(self.replica.set_canary(asked.share))

    async def _chosen(self, change: Any) -> dict[str, Any]:
        try:
            return {**_told(await change), "resident": self.replica.resident}
        except NoSuchPolicy as error:
            raise ApiError(409, str(error), "version", "no_such_policy") from error

    # ---- the fleet

    async def fleet_status(self) -> Mapping[str, Any]:
        fleet = self._fleet_of(None)
        try:
            return await fleet.status()
        except RollcastError as error:
            raise _unavailable(error) from error

    async def fleet_size(self, asked: FleetSize) -> Mapping[str, Any]:
        fleet = self._fleet_of(asked.run)
        try:
            return await fleet.scale(asked.workers)
        except RollcastError as error:
            raise _unavailable(error) from error

    def _fleet_of(self, run: str | None) -> Fleet:
        if self.fleet is None or run not in (None, self.served.name):
            raise ApiError(404, f"only the run {self.served.name} is served here", "run", "run_not_found")
        return self.fleet


def _told(releases: Releases) -> dict[str, Any]:
    return {"best": releases.best, "previous": list(releases.previous), "canary": releases.canary}


def _unavailable(error: RollcastError) -> ApiError:
    return ApiError(409, f"{error.what} {error.why} {error.fix}", "workers", "fleet")
