"""Losses and gradients against plain numpy on 1,000 random ragged cases; garbage against the mask."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rollcast_learners.losses import kl, policy_loss, token_mean, value_loss

NAN, INF = float("nan"), float("inf")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def ragged(random, tokens=None):
    """Packed columns of sequences of any length: log-probabilities, old ones, advantages, mask."""
    tokens = int(random.integers(1, 80)) if tokens is None else tokens
    logprobs = -random.exponential(2.0, size=tokens)
    old = logprobs + random.normal(scale=0.3, size=tokens)
    return logprobs, old, random.normal(size=tokens), random.random(tokens) < 0.7


def numpy_policy_loss(logprobs, old, advantages, mask, low, high, total):
    """Loss, gradient and metrics, token by token, from the paper's formula and its derivative."""
    loss = clipped = divergence = clamped = 0.0
    gradient = np.zeros(len(logprobs))
    for t in np.flatnonzero(mask):
        difference = logprobs[t] - old[t]
        held = min(max(difference, -20.0), 20.0)
        ratio = np.exp(held)
        plain, cut = ratio * advantages[t], min(max(ratio, 1 - low), 1 + high) * advantages[t]
        loss -= min(plain, cut) / total
        if plain <= cut and held == difference:
            gradient[t] = -plain / total
        clipped += (cut < plain) / total
        divergence += (ratio - 1 - held) / total
        clamped += held != difference
    return loss, gradient, {"clip_fraction": clipped, "kl/behaviour": divergence, "clamped": clamped}


def numpy_value_loss(values, old, returns, mask, clip, total):
    loss = bound = 0.0
    gradient = np.zeros(len(values))
    for t in np.flatnonzero(mask):
        error = values[t] - returns[t]
        inside = clip is None or abs(values[t] - old[t]) <= clip
        held = error if inside else old[t] + clip * np.sign(values[t] - old[t]) - returns[t]
        loss += 0.5 * max(error**2, held**2) / total
        gradient[t] = error / total if error**2 >= held**2 else 0.0
        bound += (held**2 > error**2) / total
    return loss, gradient, {"value_clip_fraction": bound}


def tensors(*arrays, dtype=torch.float64):
    first, *rest, mask = (torch.from_numpy(array) for array in arrays)
    return first.to(dtype).requires_grad_(), *(one.to(dtype) for one in rest), mask


def assert_same(actual, expected, leaf):
    loss, metrics = actual
    expected_loss, expected_gradient, expected_metrics = expected
    loss.backward()
    np.testing.assert_allclose(loss.item(), expected_loss, **CLOSE)
    np.testing.assert_allclose(leaf.grad, expected_gradient, **CLOSE)
    assert metrics.keys() == expected_metrics.keys()
    for name, value in metrics.items():
        assert value.ndim == 0 and not value.requires_grad
        np.testing.assert_allclose(value.item(), expected_metrics[name], **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_policy_loss_equals_numpy_on_1000_random_cases(dtype):
    random = np.random.default_rng(2)
    for case in range(1000):
        logprobs, old, advantages, mask = ragged(random)
        if case % 10 == 0:
            old[0] -= 50.0
            advantages[0] = abs(advantages[0])  # so that the clip holds exp(20), whose float32 error is no 1e-5
        low, high = random.uniform(0.05, 0.5, size=2)
        total = int(mask.sum()) + int(random.integers(1, 50))
        arguments = tensors(logprobs, old, advantages, mask, dtype=dtype)
        actual = policy_loss(*arguments, low, high, total)
        expected = numpy_policy_loss(logprobs, old, advantages, mask, low, high, total)
        if dtype == torch.float32 and case % 10 == 0:
            actual[1].pop("kl/behaviour"), expected[2].pop("kl/behaviour")
        assert_same(actual, expected, arguments[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_value_loss_equals_numpy_on_1000_random_cases(dtype):
    random = np.random.default_rng(3)
    for case in range(1000):
        values, old, returns, mask = ragged(random)
        clip = None if case % 3 == 0 else float(random.uniform(0.05, 0.5))
        total = int(mask.sum()) + int(random.integers(1, 50))
        arguments = tensors(values, old, returns, mask, dtype=dtype)
        actual = value_loss(*arguments, clip, total)
        assert_same(actual, numpy_value_loss(values, old, returns, mask, clip, total), arguments[0])


@pytest.mark.parametrize("garbage", [NAN, INF, -INF])
def test_masked_garbage_poisons_neither_loss_nor_gradient(garbage):
    random = np.random.default_rng(4)
    *columns, mask = ragged(random, tokens=30)
    for column in columns:
        column[~mask] = garbage
    for loss_of in (
        lambda *columns: policy_loss(*columns, 0.2, 0.28, 30),
        lambda *columns: value_loss(*columns, 0.2, 30),
        lambda one, other, _, mask: (token_mean(kl("k3", one, other), mask, 30), {}),
        lambda entropy, _, __, mask: (token_mean(entropy, mask, 30), {}),
    ):
        arguments = tensors(*columns, mask)
        loss, metrics = loss_of(*arguments)
        loss.backward()
        assert loss.isfinite() and arguments[0].grad.isfinite().all()
        assert (arguments[0].grad[~arguments[-1]] == 0).all()
        assert all(value.isfinite() for value in metrics.values())


@pytest.mark.parametrize("bad", [NAN, INF])
def test_unmasked_garbage_stays_visible(bad):
    *columns, mask = tensors(*ragged(np.random.default_rng(5), tokens=10))
    mask = torch.ones_like(mask)
    columns[2][3] = bad
    assert not policy_loss(*columns, mask, 0.2, 0.2, 10)[0].isfinite()
    assert not value_loss(*columns, mask, 0.2, 10)[0].isfinite()
    assert not policy_loss(torch.full((1,), NAN), *torch.zeros(2, 1), torch.ones(1), 0.2, 0.2, 1)[0].isfinite()


@pytest.mark.parametrize("difference", [100.0, -100.0, INF, -INF])
@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0, 1e6])
def test_extreme_log_ratios_are_clamped_and_counted(difference, advantage):
    logprobs = torch.tensor([-1.0, -1.0], requires_grad=True)
    old = torch.tensor([-1.0 - difference, -1.0])
    loss, metrics = policy_loss(logprobs, old, torch.tensor([advantage] * 2), torch.ones(2), 0.2, 0.28, 2)
    loss.backward()
    assert loss.isfinite() and metrics["clamped"] == 1 and metrics["kl/behaviour"].isfinite()
    assert logprobs.grad[0] == 0 and logprobs.grad[1] == -advantage / 2


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_nothing_to_train_on_is_zero_with_zero_gradient(tokens):
    for total in (0, torch.tensor(0)):
        logprobs = torch.randn(tokens, requires_grad=True)
        mask = torch.zeros(tokens, dtype=torch.bool)
        loss, _ = policy_loss(logprobs, *torch.randn(2, tokens), mask, 0.2, 0.2, total)
        loss = loss + value_loss(logprobs, *torch.randn(2, tokens), mask, None, total)[0]
        loss.backward()
        assert loss == 0 and (logprobs.grad == 0).all()


def test_huge_values_and_returns_stay_finite():
    values = torch.tensor([1e6, -1e6], requires_grad=True)
    loss, _ = value_loss(values, torch.zeros(2), torch.tensor([-1e6, 1e6]), torch.ones(2), 0.2, 2)
    loss.backward()
    assert loss.isfinite() and values.grad.tolist() == [1e6, -1e6]


@pytest.mark.parametrize("pieces", [1, 2, 4, 8])
def test_micro_batches_add_up(pieces):
    random = np.random.default_rng(6)
    logprobs, *columns, mask = tensors(*ragged(random, tokens=203), dtype=torch.float32)
    order = torch.from_numpy(random.permutation(203))
    total = int(mask.sum())
    whole, metrics = policy_loss(logprobs, *columns, mask, 0.2, 0.28, total)
    (gradient,) = torch.autograd.grad(whole, logprobs)
    added: dict[str, float] = {}
    loss = torch.zeros(())
    for part in order.chunk(pieces):
        piece, its_metrics = policy_loss(
            logprobs[part], *(one[part] for one in columns), mask[part], 0.2, 0.28, torch.tensor(total)
        )
        loss = loss + piece
        added = {name: added.get(name, 0.0) + value.item() for name, value in its_metrics.items()}
    torch.testing.assert_close(loss, whole, **CLOSE)
    torch.testing.assert_close(torch.autograd.grad(loss, logprobs)[0], gradient, **CLOSE)
    assert added == pytest.approx({name: value.item() for name, value in metrics.items()}, abs=1e-5)


def test_kl_estimates_agree_with_the_true_divergence():
    generator = torch.Generator().manual_seed(7)
    policy, other = torch.randn(2, 10, generator=generator, dtype=torch.float64).log_softmax(-1)
    truth = (policy.exp() * (policy - other)).sum()
    for kind in ("k1", "k3"):
        # The exact expectation over the policy, instead of samples.
        torch.testing.assert_close((policy.exp() * kl(kind, policy, other)).sum(), truth)
    assert (kl("k2", policy, other) == (policy - other) ** 2 / 2).all()


def test_only_k2_has_the_gradient_of_the_divergence():
    policy_logits, other_logits = torch.randn(2, 10, dtype=torch.float64)
    policy_logits.requires_grad_()
    policy, other = policy_logits.log_softmax(-1), other_logits.log_softmax(-1)
    (truth,) = torch.autograd.grad((policy.exp() * (policy - other)).sum(), policy_logits, retain_graph=True)
    expected = {
        kind: torch.autograd.grad(
            (policy.exp().detach() * kl(kind, policy, other)).sum(), policy_logits, retain_graph=True
        )[0]
        for kind in ("k1", "k2", "k3")
    }
    torch.testing.assert_close(expected["k2"], truth)
    torch.testing.assert_close(expected["k1"], torch.zeros(10, dtype=torch.float64))
    torch.testing.assert_close(expected["k3"], policy.exp().detach() - other.exp())


@settings(max_examples=100, deadline=None)
@given(st.floats(-1e4, 0), st.floats(-1e4, 0))
def test_kl_is_finite_and_of_the_right_sign(logprob, other):
    pair = torch.tensor([logprob]), torch.tensor([other])
    assert abs(kl("k1", *pair)) <= 20
    assert 0 <= kl("k2", *pair) <= 200
    assert 0 <= kl("k3", *pair) < INF


def test_unknown_kl_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'k4'.*k1, k2, k3"):
        kl("k4", torch.zeros(1), torch.zeros(1))
