"""How a step is cut changes nothing: micro-batches, minibatches, the order of episodes, shared prefixes."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from learner_steps import BATCH, FULL, NO_CLIP, check_same_step, gradient
from rollcast_learners import attention, prefix_tree
from rollcast_learners.advantages import moments
from rollcast_learners.algorithms import ALGORITHMS
from rollcast_learners.batch import collate
from rollcast_learners.settings import CorrectionSettings, KLSettings
from trajectories import answer


@pytest.mark.parametrize("budget", [1, 7, 30, 60])
@pytest.mark.parametrize("critic, normalize", [("head", "batch"), ("none", "group"), ("head", "none")])
def test_microbatches_change_nothing(critic, normalize, budget, build):
    settings = FULL | {"critic": critic, "normalize_advantages": normalize}
    whole, parts = build(**settings), build(**settings, microbatch_tokens=budget)
    batch = collate(BATCH, "bootstrap")
    assert len(batch.microbatches(budget)) > 1
    check_same_step(whole, parts, whole.step(batch).metrics, parts.step(batch).metrics)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_microbatches_change_nothing_whatever_the_algorithm(name, build):
    critic = ALGORITHMS[name].presets.get("critic", "head")
    kl_settings = KLSettings(kind="k1", coef=0.1) if name == "soft_q" else None
    correction = None if name == "soft_q" else CorrectionSettings(correction="sequence_tis")
    settings = {"critic": critic, "algorithm": name, "kl_settings": kl_settings, "correction": correction}
    whole = build(**settings, value=0.1, grad_clip=NO_CLIP)
    parts = build(**settings, value=0.1, grad_clip=NO_CLIP, microbatch_tokens=25)
    batch = collate(BATCH, "mask")
    assert 0 < batch.trained_episodes < batch.episodes and len(batch.microbatches(25)) > 1
    check_same_step(whole, parts, whole.step(batch).metrics, parts.step(batch).metrics)
    assert not torch.equal(gradient(whole)["lm.model.norm.weight"], torch.zeros(64))


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
@pytest.mark.parametrize("applied_as", ["reward", "loss"])
def test_microbatches_change_nothing_with_a_reference(kind, applied_as, build):
    kl_settings = KLSettings(kind=kind, coef=0.3, applied_as=applied_as)
    whole = build(kl_settings=kl_settings, **FULL)
    parts = build(kl_settings=kl_settings, **FULL, microbatch_tokens=25)
    batch = collate(BATCH)
    check_same_step(whole, parts, whole.step(batch).metrics, parts.step(batch).metrics)


@pytest.mark.parametrize("budget", [10, 4096])
def test_the_order_of_trajectories_changes_nothing(budget, build):
    straight, mixed = build(**FULL, microbatch_tokens=budget), build(**FULL, microbatch_tokens=budget)
    shuffled = [BATCH[i] for i in np.random.default_rng(0).permutation(len(BATCH))]
    metrics = straight.step(collate(BATCH)).metrics
    check_same_step(straight, mixed, metrics, mixed.step(collate(shuffled)).metrics)


def test_sharing_changes_nothing(build, monkeypatch):
    """The same samples, each beginning held once, and each sample by itself."""
    samples = [answer([1, 2, 3, g], [4 + n, 5, 6], 0.1 * n, group=str(g), number=n) for g in range(2) for n in range(3)]
    samples += [dataclasses.replace(sample, prompt=sample.prompt) for sample in samples[:2]]  # Word for word.
    shared = collate(samples)
    monkeypatch.setattr(prefix_tree.PrefixTree, "add", add_alone)
    alone = collate(samples)
    assert (shared.tokens, alone.tokens) == (3 + 2 * (1 + 3 * 2), 8 * 6)
    one, other = build(**FULL), build(**FULL)
    check_same_step(one, other, one.step(shared).metrics, other.step(alone).metrics)


def add_alone(tree, number, tokens_T):
    """In place of `PrefixTree.add`: a segment for each sequence, whatever it begins with."""
    tree._top.following[-number] = prefix_tree.Segment(tokens_T, [number])


def test_many_calls_change_nothing(build, monkeypatch):
    joined, apart = build(**FULL), build(**FULL)
    metrics = joined.step(collate(BATCH)).metrics
    monkeypatch.setattr(attention, "JOINED_ROWS", 0)
    check_same_step(joined, apart, metrics, apart.step(collate(BATCH)).metrics)


@pytest.mark.parametrize("epochs, minibatches", [(2, 1), (1, 3), (2, 4)])
def test_microbatches_change_nothing_over_epochs_and_minibatches(epochs, minibatches, build):
    settings = FULL | {"epochs": epochs, "minibatches": minibatches, "learning_rate": 1e-4}
    whole, parts = build(**settings), build(**settings, microbatch_tokens=25)
    batch = collate(BATCH)
    check_same_step(whole, parts, whole.step(batch).metrics, parts.step(batch).metrics)


@pytest.mark.parametrize("epochs, minibatches, learners", [(1, 1, 1), (3, 4, 1), (2, 5, 3), (1, 16, 2)])
def test_every_token_is_trained_once_an_epoch(epochs, minibatches, learners, build):
    learner = build(epochs=epochs, minibatches=minibatches)
    batch = collate(BATCH)
    seen = np.zeros((epochs, len(batch.target_N)), int)
    sizes = np.zeros((epochs, minibatches), int)
    starts = np.cumsum(batch.episode_length_E) - batch.episode_length_E
    for share in batch.shares(learners):
        for number, episodes in enumerate(learner._minibatches(share)):
            epoch, part = divmod(number, minibatches)
            for at in share.index_E[episodes]:
                seen[epoch, starts[at] : starts[at] + batch.episode_length_E[at]] += 1
            sizes[epoch, part] += len(episodes)
    assert (seen == 1).all()
    assert sizes.max() - sizes.min() <= 1


def test_epochs_and_steps_draw_different_minibatches(build):
    learner, batch = build(epochs=2, minibatches=2), collate(BATCH)
    first, _, second, _ = learner._minibatches(batch)
    assert first.tolist() != second.tolist()
    learner.steps_done = 1
    assert next(learner._minibatches(batch)).tolist() != first.tolist()


def test_a_minibatch_without_episodes_moves_nothing(build):
    """More minibatches than episodes: the empty ones are no optimiser steps, not even by momentum."""
    few, learner = collate(BATCH[:2]), build(minibatches=6)
    learner.step(few)
    assert {int(s["step"]) for s in learner.optimizer.adamw.state.values()} == {2}


def test_moments_of_shares_are_those_of_the_batch():
    """What `reduce` sums over learners."""
    column = torch.randn(20)
    assert_close(moments(column[:7]) + moments(column[7:]), moments(column))
