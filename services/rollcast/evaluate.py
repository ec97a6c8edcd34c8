"""Evaluation on a split while training goes on: greedy answers of exactly one policy version.

Owns: which questions are asked, and figures from the answers. Does not know how they are played or when.
"""

import importlib
import inspect
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import gymnasium

from rollcast.config import EnvSection, EvalSection
from rollcast.environments import register_environments
from rollcast.errors import ConfigError
from rollcast.fleet import Fleet
from rollcast_learners.types import Prompt, Trajectory

UNSIZED_QUESTIONS = 64
"""Questions asked of an environment without a fixed number of tasks."""


def evaluation_prompts(envs: Sequence[EnvSection], settings: EvalSection) -> list[Prompt]:
    """Every question of the split, or the first `samples` of it, for each environment."""
    return [prompt for number, env in enumerate(envs) for prompt in _prompts_of(number, env, settings)]


def _prompts_of(number: int, env: EnvSection, settings: EvalSection) -> list[Prompt]:
    kwargs = dict(env.kwargs)
    if "split" in inspect.signature(creator_of(env.id)).parameters:
        kwargs["split"] = settings.split
    made: Any = gymnasium.make(env.id, **kwargs)
    size: int | None = getattr(made.unwrapped, "size", None)
    made.close()
    count = min(size or UNSIZED_QUESTIONS, settings.samples or size or UNSIZED_QUESTIONS)
    return [
        Prompt(f"eval.{number}.{i}", f"eval.{number}.{i}", env.id, i, kwargs, {"index": i} if size else None)
        for i in range(count)
    ]


def creator_of(env_id: str) -> Any:
    """The class or function that makes the environment. Raises `ConfigError` for an id that nobody registered."""
    register_environments()
    module, _, name = env_id.rpartition(":")
    try:
        if module:
            importlib.import_module(module)
        entry = gymnasium.spec(name).entry_point
        return gymnasium.envs.registration.load_env_creator(entry) if isinstance(entry, str) else entry
    except (gymnasium.error.Error, ModuleNotFoundError) as error:
        known = sorted(name for name in gymnasium.registry if name.startswith("rollcast/"))
        raise ConfigError(
            f"There is no environment {env_id!r}.",
            str(error),
            f"Use one of {', '.join(known)}, or module:Id-v0 of a module that registers it.",
        ) from error


def short_name(env_id: str) -> str:
    """`rollcast/QA-v0` is `QA-v0` in the names of metrics."""
    return env_id.rsplit("/", 1)[-1]


def figures(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """`eval/<env>/<metric>` and `eval_kind/<env>/<kind>/<metric>`: means over the episodes that ended well."""
    values: dict[str, list[float]] = defaultdict(list)
    for trajectory in trajectories:
        if trajectory.error is not None:
            continue
        env = short_name(trajectory.prompt.env_id)
        for metric, value in {**trajectory.metrics, "reward": trajectory.reward}.items():
            values[f"eval/{env}/{metric}"].append(value)
            if trajectory.kind:
                values[f"eval_kind/{env}/{trajectory.kind}/{metric}"].append(value)
    return {name: sum(found) / len(found) for name, found in sorted(values.items())}


def answered_by(trajectory: Trajectory, version: int) -> bool:
    """Whether every token is of this version; an episode that failed before its first token is of any."""
    return set(trajectory.versions) <= {version}


class Evaluation:
    """Questions asked of one policy version, until every one is answered by that version."""

    def __init__(self, step: int, version: int, questions: Sequence[Prompt]) -> None:
        self.step = step
        self.version = version
        self.questions = list(questions)
        self.answers: list[Trajectory] = []

    def ask(self, fleet: Fleet) -> None:
        fleet.evaluate(self.questions)

    def done(self, fleet: Fleet) -> bool:
        """Takes in what has come; asks again what a lost worker, or another version, left unanswered."""
        arrived, fleet.evaluated = fleet.evaluated, []
        again, fleet.lost_evaluations = fleet.lost_evaluations, []
        for answer in arrived:
            if answered_by(answer, self.version):
                self.answers.append(answer)
            else:
                again.append(answer.prompt)
        if again and fleet.ready():
            fleet.evaluate(again)
        elif again:
            fleet.lost_evaluations = again
        return len(self.answers) == len(self.questions)

    def figures(self) -> dict[str, float]:
        return figures(self.answers)
