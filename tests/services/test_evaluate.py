"""Figures of an evaluation: means, corpus metrics with their signatures, avg@k and pass@k, environments apart."""

import doctest
import math
from typing import Any

import numpy as np
import pytest
import sacrebleu

import rollcast.evaluate
from rollcast.config import EnvSection, EvalSection
from rollcast.errors import ConfigError
from rollcast.evaluate import Evaluation, evaluation_prompts, figures, pass_at_k, repeated
from rollcast_learners.types import Prompt, Sampling, Stream, Trajectory, Turn, VersionSpan


def answered(prompt: Prompt, answer: str, metrics: dict[str, float], version: int = 3, **more: Any) -> Trajectory:
    one = np.ones(1, np.int32)
    stream = Stream(one, np.array([True]), one.astype(np.float32), (VersionSpan(version, 0, 1),))
    turn = Turn(0, 0, 1, "question", answer, metrics.get("f1", 0.0), "stop")
    return Trajectory(prompt, (stream,), (turn,), True, False, metrics, **more)


def asked(number: int, env: str = "rollcast/QA-v0", name: str = "") -> Prompt:
    return Prompt(f"eval.0.{number}", f"eval.0.{number}", env, number, env_name=name)


def test_means_are_by_environment_and_kind_and_leave_failures_out() -> None:
    found = figures(
        [
            answered(asked(0), "Paris", {"f1": 1.0}, kind="capital"),
            answered(asked(1), "Rome", {"f1": 0.0}, kind="currency"),
            answered(asked(2), "", {"f1": 0.0}, kind="capital", error="it broke"),
            answered(asked(3, name="other"), "x", {"f1": 0.25}),
        ]
    ).values
    assert found["eval/QA-v0/f1"] == 0.5 and found["eval_kind/QA-v0/capital/f1"] == 1.0
    assert found["eval/other/f1"] == 0.25 and found["eval/QA-v0/reward"] == 0.5
    assert not any(name.startswith("eval_kind/other") for name in found)


def test_corpus_metrics_are_sacrebleu_s_over_all_answers() -> None:
    pairs = [("El gato duerme.", "El gato está durmiendo."), ("Hola a todos.", "Hola a todos."), ("No", "Sí.")]
    env = "rollcast/Translation-v0"
    played = [answered(asked(i, env), a, {"chrf": 0.5}, references=(r,)) for i, (a, r) in enumerate(pairs)]
    found, told = figures(played)
    theirs = sacrebleu.corpus_chrf([a for a, _ in pairs], [[r for _, r in pairs]])
    assert math.isclose(found["eval/Translation-v0/corpus_chrf"], theirs.score / 100, abs_tol=1e-9)
    assert found["eval/Translation-v0/chrf"] == 0.5
    assert "nc:6" in told["eval/Translation-v0/corpus_chrf"] and "tok:13a" in told["eval/Translation-v0/corpus_bleu"]
    assert figures([answered(asked(0), "Paris", {"f1": 1.0})]).signatures == {}


def test_sampled_answers_give_avg_and_pass_at_k() -> None:
    prompts = repeated([asked(0), asked(1)], 4)
    assert [prompt.id for prompt in prompts[:2]] == ["eval.0.0.0", "eval.0.0.1"]
    right = [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    sampled = [
        answered(prompt, "", {"exact_match": hit, "f1": 0.5 + hit / 4})
        for prompt, hit in zip(prompts, right, strict=True)
    ]
    found = figures([], sampled).values
    assert found["eval/QA-v0/sampled_exact_match"] == 1 / 8
    assert found["eval/QA-v0/pass@4_exact_match"] == 0.5, "one of two questions is answered by one of four answers"
    assert not any("pass" in name and "f1" in name for name in found), "f1 is no matter of passing"


@pytest.mark.parametrize(
    ("n", "right", "k", "expected"), [(4, 1, 2, 0.5), (4, 0, 4, 0.0), (4, 4, 1, 1.0), (3, 1, 3, 1.0)]
)
def test_pass_at_k_is_the_unbiased_estimate(n: int, right: int, k: int, expected: float) -> None:
    assert pass_at_k(n, right, k) == expected


def test_the_examples_in_the_documentation_are_true() -> None:
    assert doctest.testmod(rollcast.evaluate).failed == 0


class Listener:
    """A fleet that plays nothing: it remembers what it was asked, and answers what it is told to."""

    def __init__(self) -> None:
        self.asked: list[tuple[Prompt, Sampling]] = []
        self.evaluated: list[Trajectory] = []
        self.lost_evaluations: list[Prompt] = []

    def ready(self) -> int:
        return 1

    def evaluate(self, prompts: Any, sampling: Sampling) -> None:
        self.asked += [(prompt, sampling) for prompt in prompts]


def test_an_evaluation_names_one_version_and_asks_again_what_another_answered() -> None:
    fleet: Any = Listener()
    settings = EvalSection(sampled=2, restrict_answers=True)
    evaluation = Evaluation(4, 3, [asked(0)], settings, Sampling(0.7, 16))
    evaluation.ask(fleet)
    assert [(p.id, s.temperature) for p, s in fleet.asked] == [
        ("eval.0.0", 0.0),
        ("eval.0.0.0", 0.7),
        ("eval.0.0.1", 0.7),
    ]
    assert all(sampling.restricted and sampling.max_new_tokens == 16 for _, sampling in fleet.asked)
    first = fleet.asked[:]
    fleet.asked.clear()
    fleet.evaluated = [answered(p, "x", {"f1": 1.0}, version=2 if p.id == "eval.0.0.1" else 3) for p, _ in first]
    assert not evaluation.done(fleet)
    assert [(p.id, s.temperature) for p, s in fleet.asked] == [("eval.0.0.1", 0.7)], "the one of version 2, sampled"
    fleet.evaluated = [answered(first[2][0], "x", {"f1": 0.0})]
    assert evaluation.done(fleet)
    assert evaluation.figures().values["eval/QA-v0/sampled_f1"] == 0.5


def test_prompts_of_several_environments_carry_their_names_and_rewards() -> None:
    reward = {"function": "repetition", "weight": -0.5}
    envs = [
        EnvSection.model_validate({"id": "rollcast/QA-v0", "name": "places", "rewards": [reward]}),
        EnvSection.model_validate({"id": "rollcast/Translation-v0", "kwargs": {"target": "fr"}}),
    ]
    prompts = evaluation_prompts(envs, EvalSection(samples=2, split="test"))
    assert [prompt.label for prompt in prompts] == ["places", "places", "Translation-v0", "Translation-v0"]
    assert prompts[0].scoring is not None and prompts[0].scoring["rewards"][0]["function"] == "repetition"
    assert prompts[2].scoring is None and prompts[2].kwargs == {"target": "fr", "split": "test"}


def test_data_that_cannot_be_read_are_a_configuration_error(tmp_path: Any) -> None:
    (tmp_path / "empty.jsonl").touch()
    env = EnvSection.model_validate({"id": "rollcast/QA-v0", "kwargs": {"data": str(tmp_path / "empty.jsonl")}})
    with pytest.raises(ConfigError, match=r"empty\.jsonl"):
        evaluation_prompts([env], EvalSection())
