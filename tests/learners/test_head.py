"""The chunked head against plain full logits: values, both gradients, precision, memory."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rollcast_learners import head
from rollcast_learners.head import logprobs_and_entropy, scores

LEARNERS = Path(head.__file__).parents[1]


def naive_logprobs_and_entropy(hidden, weight, targets, temperature=1.0):
    return naive_scores(hidden, weight, targets, temperature)[:2]


def naive_scores(hidden, weight, targets, temperature=1.0):
    logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32)) / temperature
    logprobs = logits.log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, targets[:, None])[:, 0], entropy, logits.logsumexp(-1)


@pytest.fixture
def small_steps(monkeypatch):
    """So that a few rows already take several chunks and tiles, the last of each incomplete."""
    monkeypatch.setattr(head, "CHUNK_ROWS", 6)
    monkeypatch.setattr(head, "TILE_ROWS", 4)
    monkeypatch.setattr(head, "VOCABULARY_BLOCK", 10)


def problem(tokens, dtype, vocabulary=37, hidden=16):
    generator = torch.Generator().manual_seed(tokens)
    hidden_TD = torch.randn(tokens, hidden, generator=generator, dtype=torch.float64)
    weight_VD = torch.randn(vocabulary, hidden, generator=generator, dtype=torch.float64) / 2
    targets_T = torch.randint(0, vocabulary, (tokens,), generator=generator)
    return hidden_TD.to(dtype).requires_grad_(), weight_VD.to(dtype).requires_grad_(), targets_T


def loss_of(logprobs, entropy, *normalizers, parts):
    """Uneven weights, so that rows and all outputs can be told apart."""
    rows = torch.linspace(-1.0, 2.0, len(logprobs), dtype=logprobs.dtype)
    loss = torch.zeros((), dtype=logprobs.dtype)
    if "logprobs" in parts:
        loss = loss + (rows * logprobs).sum()
    if "entropy" in parts:
        loss = loss + (rows.square() * entropy).sum()
    if "normalizers" in parts:
        loss = loss + (rows.exp() * normalizers[0]).sum()
    return loss


NAMES = ("logprobs", "entropy", "normalizers")
PARTS = [NAMES[:1], NAMES[1:2], NAMES[:2], NAMES[2:], NAMES]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("tokens", [0, 1, 4, 6, 13])
def test_values_and_gradients_equal_full_logits(small_steps, tokens, parts, temperature):
    exact = problem(tokens, torch.float64)
    expected = naive_scores(*exact, temperature)
    expected_gradients = torch.autograd.grad(loss_of(*expected, parts=parts), exact[:2])
    for dtype, close in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        inputs = [one.detach().to(dtype).requires_grad_() for one in exact[:2]]
        actual = scores(*inputs, exact[2], temperature)
        gradients = torch.autograd.grad(loss_of(*actual, parts=parts), inputs)
        for ours, theirs in zip(actual + gradients, expected + expected_gradients, strict=True):
            assert ours.dtype == dtype
            torch.testing.assert_close(ours.double(), theirs, rtol=close, atol=close)


def test_gradcheck(small_steps):
    hidden, weight, targets = problem(7, torch.float64, vocabulary=11, hidden=3)
    assert torch.autograd.gradcheck(lambda *inputs: tuple(scores(*inputs, targets, 0.8)), (hidden, weight))


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
def test_only_wanted_gradients_are_computed(small_steps, wanted):
    hidden, weight, targets = problem(9, torch.float64)
    both = torch.autograd.grad(
        loss_of(*naive_logprobs_and_entropy(hidden, weight, targets), parts=PARTS[0]), (hidden, weight)
    )
    inputs = [one.detach().requires_grad_(want) for one, want in zip((hidden, weight), wanted, strict=True)]
    loss = loss_of(*logprobs_and_entropy(*inputs, targets), parts=PARTS[0])
    assert loss.requires_grad == any(wanted)
    if loss.requires_grad:
        loss.backward()
    for one, want, expected in zip(inputs, wanted, both, strict=True):
        assert (one.grad is not None) == want
        if want:
            torch.testing.assert_close(one.grad, expected)


def test_bfloat16_is_close_and_no_worse_than_full_logits():
    hidden, weight, targets = problem(700, torch.bfloat16, vocabulary=3000, hidden=64)
    inputs = [hidden, (weight.detach() / 2).requires_grad_()]
    exact = [one.detach().double().requires_grad_() for one in inputs]
    both = ("logprobs", "entropy")
    expected = naive_logprobs_and_entropy(*exact, targets)
    expected += torch.autograd.grad(loss_of(*expected, parts=both), exact)
    errors = []
    for function in (logprobs_and_entropy, naive_logprobs_and_entropy):
        results = function(*inputs, targets)
        assert results[0].dtype == results[1].dtype == torch.float32
        results += torch.autograd.grad(loss_of(*results, parts=both), inputs)
        errors.append([distance(one, other) for one, other in zip(results, expected, strict=True)])
    assert max(errors[0]) < 2e-2
    assert all(ours < 1.1 * theirs for ours, theirs in zip(*errors, strict=True))


def distance(actual, expected):
    return float((actual.detach().double() - expected.detach()).norm() / expected.detach().norm())


def test_autocast_gives_float32_master_weights_an_unrounded_gradient():
    hidden, weight, targets = problem(100, torch.float32, vocabulary=500, hidden=32)
    with torch.autocast("cpu", torch.bfloat16):
        results = logprobs_and_entropy(hidden, weight, targets)
    loss_of(*results, parts=PARTS[0]).backward()
    halves = [one.detach().bfloat16() for one in (hidden, weight)]
    torch.testing.assert_close(results, logprobs_and_entropy(*halves, targets), rtol=0, atol=0)
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32
    exact = problem(100, torch.float64, vocabulary=500, hidden=32)
    expected = torch.autograd.grad(loss_of(*naive_logprobs_and_entropy(*exact), parts=PARTS[0]), exact[:2])
    assert distance(hidden.grad, expected[0]) < 2e-2 and distance(weight.grad, expected[1]) < 2e-2


@pytest.mark.parametrize("pieces", [1, 2, 4, 8])
def test_micro_batches_add_up(small_steps, pieces):
    hidden, weight, targets = problem(41, torch.float32)
    coefficients = torch.linspace(-1, 1, 41)
    gradients = []
    for split in (1, pieces):
        loss = torch.zeros(())
        for rows in torch.arange(41).flip(0).chunk(split):
            logprobs, entropy = logprobs_and_entropy(hidden[rows], weight, targets[rows])
            loss = loss + (coefficients[rows] * (logprobs + 0.1 * entropy)).sum() / 41
        gradients.append(torch.autograd.grad(loss, (hidden, weight)))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-5)


def test_extreme_logits_stay_finite():
    hidden, weight, targets = problem(5, torch.float32)
    results = logprobs_and_entropy(hidden * 1e4, weight, targets)
    loss_of(*results, parts=NAMES[:2]).backward()
    assert all(one.isfinite().all() for one in (*results, hidden.grad, weight.grad))
    assert (results[1] >= 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_hidden_state_spoils_its_own_row_only(bad):
    hidden, weight, targets = problem(5, torch.float32)
    spoiled = hidden.detach().clone()
    spoiled[2, 0] = bad
    for result in logprobs_and_entropy(spoiled, weight, targets):
        assert result.isnan().tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(ValueError, match=r"temperature is .*above 0"):
        logprobs_and_entropy(*problem(2, torch.float32), temperature)


@pytest.mark.parametrize("shapes", [((2, 3), (5, 4), (2,)), ((2, 3), (5, 3), (3,)), ((1, 2, 3), (5, 3), (1,))])
def test_shapes_must_fit(shapes):
    hidden, weight, targets = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=r"expected \(T, D\), \(V, D\) and \(T,\)"):
        logprobs_and_entropy(hidden, weight, targets)


class LargestTensor(TorchDispatchMode):
    """Counts the elements of the largest tensor any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


def test_no_tensor_is_larger_than_a_chunk():
    hidden, weight, targets = problem(2000, torch.float32, vocabulary=400, hidden=8)
    with LargestTensor() as seen:
        loss_of(*logprobs_and_entropy(hidden, weight, targets), parts=NAMES[:2]).backward()
    assert seen.largest == head.CHUNK_ROWS * 400


MEASURE_PEAK = """
import resource, sys, torch
sys.path[:0] = {path!r}
{imports}
torch.set_num_threads(2)
hidden = torch.randn(2048, 16).bfloat16().requires_grad_()
weight = torch.randn(49152, 16).bfloat16().requires_grad_()
targets = torch.arange(2048)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
logprobs, entropy = {function}(hidden, weight, targets)
(logprobs.sum() + entropy.sum()).backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def peak_kib(imports: str, function: str) -> int:
    program = MEASURE_PEAK.format(path=[str(LEARNERS), str(Path(__file__).parent)], imports=imports, function=function)
    finished = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    return int(finished.stdout)


def test_peak_memory_is_a_fraction_of_full_logits():
    ours = peak_kib("from rollcast_learners.head import logprobs_and_entropy", "logprobs_and_entropy")
    naive = peak_kib("from test_head import naive_logprobs_and_entropy", "naive_logprobs_and_entropy")
    assert ours < 0.25 * naive, f"{ours} KiB against {naive} KiB"
