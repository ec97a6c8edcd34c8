"""Evaluation on a split while training goes on: answers of exactly one policy version, greedy and sampled.

Owns: which questions are asked, and figures from the answers. Does not know how they are played or when.
"""

import importlib
import inspect
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import gymnasium

from rollcast.config import EnvSection, EvalSection
from rollcast.environments import make_environment, register_environments
from rollcast.errors import ConfigError
from rollcast.fleet import Fleet
from rollcast_envs.errors import DataError
from rollcast_envs.text import Answered, CorpusFigure
from rollcast_learners.types import Prompt, Sampling, Trajectory

UNSIZED_QUESTIONS = 64
"""Questions asked of an environment without a fixed number of tasks."""


def evaluation_prompts(envs: Sequence[EnvSection], settings: EvalSection) -> list[Prompt]:
    """Every question of the split, or the first `samples` of it, for each environment.

    Raises `ConfigError` for an environment that nobody registered, or whose data cannot be read.
    """
    return [prompt for number, env in enumerate(envs) for prompt in _prompts_of(number, env, settings)]


def repeated(prompts: Sequence[Prompt], times: int) -> list[Prompt]:
    """The same questions for sampled answers, `times` each."""
    return [replace(prompt, id=f"{prompt.id}.{k}") for prompt in prompts for k in range(times)]


def _prompts_of(number: int, env: EnvSection, settings: EvalSection) -> list[Prompt]:
    kwargs = on_split(env, settings.split)
    made = made_once(env, kwargs)
    size: int | None = getattr(made.unwrapped, "size", None)
    made.close()
    count = min(size or UNSIZED_QUESTIONS, settings.samples or size or UNSIZED_QUESTIONS)
    return [
        Prompt(
            f"eval.{number}.{i}",
            f"eval.{number}.{i}",
            env.id,
            i,
            kwargs,
            {"index": i} if size else None,
            env.label,
            env.scoring,
        )
        for i in range(count)
    ]


def on_split(env: EnvSection, split: str) -> dict[str, Any]:
    """The environment's arguments for `split`, if it has splits at all."""
    return {**env.kwargs, "split": split} if takes_split(env) else dict(env.kwargs)


def takes_split(env: EnvSection) -> bool:
    """Whether the environment has an argument `split`. Raises `ConfigError` for an id that nobody registered."""
    return "split" in inspect.signature(creator_of(env.id)).parameters


def made_once(env: EnvSection, kwargs: Mapping[str, Any]) -> Any:
    """The environment, made here to see that it can be. Raises `ConfigError` with what is wrong with its settings."""
    creator_of(env.id)
    try:
        return make_environment(env.id, kwargs, env.scoring)
    except DataError as error:
        raise ConfigError(error.what, error.why, error.fix) from error
    except (TypeError, ValueError) as error:
        fix = f"correct the arguments of {env.label} in env.kwargs"
        raise ConfigError(f"{env.id} cannot be made", str(error), fix) from error


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


# ---- figures


class Figures(NamedTuple):
    """What an evaluation found. Evaluation -> metrics.jsonl and signatures.json."""

    values: dict[str, float]
    signatures: dict[str, str]
    """How each corpus metric was computed, in its library's words."""


def figures(trajectories: Sequence[Trajectory], sampled: Sequence[Trajectory] = ()) -> Figures:
    """All figures of an evaluation; episodes that failed are not among them.

    `eval/<env>/<metric>` and `eval_kind/<env>/<kind>/<metric>` are means over greedy answers, or corpus metrics of all
    of them; `eval/<env>/sampled_<metric>` is avg@k, the mean over k sampled answers to each question, and
    `eval/<env>/pass@k_<metric>`, for metrics that are 0 or 1, the share of questions that one of k answers gets right.
    """
    corpus = corpus_figures(trajectories)
    values = {name: figure.value for name, figure in corpus.items()}
    signatures = {name: figure.signature for name, figure in corpus.items() if figure.signature}
    return Figures(dict(sorted((_means(trajectories) | values | _sampled_figures(sampled)).items())), signatures)


def _means(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    values: dict[str, list[float]] = defaultdict(list)
    for trajectory, metric, value in _values(trajectories):
        env = trajectory.prompt.label
        values[f"eval/{env}/{metric}"].append(value)
        if trajectory.kind:
            values[f"eval_kind/{env}/{trajectory.kind}/{metric}"].append(value)
    return {name: sum(found) / len(found) for name, found in values.items()}


def _values(trajectories: Sequence[Trajectory]) -> Iterator[tuple[Trajectory, str, float]]:
    for trajectory in trajectories:
        if trajectory.error is None:
            for metric, value in {**trajectory.metrics, "reward": trajectory.reward}.items():
                yield trajectory, metric, value


def _sampled_figures(sampled: Sequence[Trajectory]) -> dict[str, float]:
    by_question: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for trajectory, metric, value in _values(sampled):
        by_question[trajectory.prompt.label, metric][trajectory.prompt.group_id].append(value)
    found: dict[str, float] = {}
    for (env, metric), questions in by_question.items():
        answers = [value for values in questions.values() for value in values]
        found[f"eval/{env}/sampled_{metric}"] = sum(answers) / len(answers)
        k = min(len(values) for values in questions.values())
        if metric != "reward" and set(answers) <= {0.0, 1.0}:
            passed = [pass_at_k(len(values), int(sum(values)), k) for values in questions.values()]
            found[f"eval/{env}/pass@{k}_{metric}"] = sum(passed) / len(passed)
    return found


def pass_at_k(n: int, right: int, k: int) -> float:
    """Unbiased chance that one of k answers is right, where `right` of n were (Chen et al. 2021, "Codex", equation 1).

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def corpus_figures(trajectories: Sequence[Trajectory]) -> dict[str, CorpusFigure]:
    """`eval/<env>/<metric>` of metrics that an environment computes over all answers, with their signatures."""
    answered: dict[tuple[str, str], list[Answered]] = defaultdict(list)
    for trajectory in trajectories:
        if trajectory.error is None and trajectory.turns:
            place = trajectory.prompt.label, trajectory.prompt.env_id
            answered[place].append(Answered(trajectory.turns[-1].answer, trajectory.references))
    found: dict[str, CorpusFigure] = {}
    for (label, env_id), answers in answered.items():
        of_environment = getattr(creator_of(env_id), "corpus_metrics", None)
        if of_environment is not None:
            found |= {f"eval/{label}/{name}": figure for name, figure in of_environment(answers).items()}
    return found


def answered_by(trajectory: Trajectory, version: int) -> bool:
    """Whether every token is of this version; an episode that failed before its first token is of any."""
    return set(trajectory.versions) <= {version}


class Evaluation:
    """Questions asked of one policy version, until every one is answered by that version."""

    def __init__(
        self, step: int, version: int, questions: Sequence[Prompt], settings: EvalSection, sampling: Sampling
    ) -> None:
        self.step = step
        self.version = version
        self.greedy = replace(sampling, temperature=0.0, restricted=settings.restrict_answers)
        self.sampling = replace(sampling, restricted=settings.restrict_answers)
        self.questions = list(questions)
        self.repeated = repeated(questions, settings.sampled)
        self._repeated_ids = {prompt.id for prompt in self.repeated}
        self.answers: list[Trajectory] = []
        self.sampled: list[Trajectory] = []

    def ask(self, fleet: Fleet) -> None:
        self._ask(fleet, [*self.questions, *self.repeated])

    def done(self, fleet: Fleet) -> bool:
        """Takes in what has come; asks again what a lost worker, or another version, left unanswered."""
        arrived, fleet.evaluated = fleet.evaluated, []
        again, fleet.lost_evaluations = fleet.lost_evaluations, []
        for answer in arrived:
            if not answered_by(answer, self.version):
                again.append(answer.prompt)
            elif answer.prompt.id in self._repeated_ids:
                self.sampled.append(answer)
            else:
                self.answers.append(answer)
        if again and fleet.ready():
            self._ask(fleet, again)
        elif again:
            fleet.lost_evaluations = again
        return len(self.answers) == len(self.questions) and len(self.sampled) == len(self.repeated)

    def figures(self) -> Figures:
        return figures(self.answers, self.sampled)

    def _ask(self, fleet: Fleet, prompts: Sequence[Prompt]) -> None:
        sampled = [prompt for prompt in prompts if prompt.id in self._repeated_ids]
        greedy = [prompt for prompt in prompts if prompt.id not in self._repeated_ids]
        if greedy:
            fleet.evaluate(greedy, self.greedy)
        if sampled:
            fleet.evaluate(sampled, self.sampling)
