"""The Triton head against plain full logits in float64: values, all gradients, precision.

On a machine with an NVIDIA GPU the kernels run there. Elsewhere they run on the CPU through Triton's interpreter, which
needs the package; it is in no CPU lock, so put it aside and run this file alone:

    pip install --no-deps --target /tmp/triton triton
    PYTHONPATH=/tmp/triton pytest tests/learners/test_head_triton.py
"""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from rollcast_learners import head
from rollcast_learners.head import scores

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # Read when the kernels are defined, that is when `head_triton` is imported.

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
NAMES = ("logprobs", "entropy", "normalizers")
PARTS = [NAMES[:1], NAMES[1:2], NAMES[:2], NAMES[2:], NAMES]


@pytest.fixture
def small_steps(monkeypatch):
    """So that a few rows already take several chunks, and each row several blocks, the last of each incomplete."""
    from rollcast_learners import head_triton

    monkeypatch.setattr(head_triton, "CHUNK_ROWS", 6)
    monkeypatch.setattr(head_triton, "BLOCK", 16)


def problem(tokens, vocabulary=37, hidden=16):
    generator = torch.Generator().manual_seed(tokens)
    hidden_TD = torch.randn(tokens, hidden, generator=generator, dtype=torch.float64)
    weight_VD = torch.randn(vocabulary, hidden, generator=generator, dtype=torch.float64) / 2
    return (
        hidden_TD.to(DEVICE),
        weight_VD.to(DEVICE),
        torch.randint(vocabulary, (tokens,), generator=generator).to(DEVICE),
    )


def run(inputs, targets, temperature=1.0, backend="triton", dtype=torch.float64, parts=NAMES):
    """The three outputs, and both gradients of a loss in which every row and output has a weight of its own."""
    inputs = [one.detach().to(dtype).requires_grad_() for one in inputs]
    found = scores(*inputs, targets, temperature, backend)
    rows_T = torch.linspace(-1.0, 2.0, len(targets), dtype=found[0].dtype, device=DEVICE)
    weights = {"logprobs": rows_T, "entropy": rows_T.square(), "normalizers": rows_T.exp()}
    loss = sum((weights[name] * column).sum() for name, column in zip(NAMES, found, strict=True) if name in parts)
    return [one.detach() for one in (*found, *torch.autograd.grad(loss, inputs))]


@needs_triton
@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
@pytest.mark.parametrize("parts", PARTS, ids="+".join)
@pytest.mark.parametrize("tokens", [0, 1, 6, 13])
def test_values_and_gradients_equal_full_logits(small_steps, tokens, parts, temperature):
    *exact, targets = problem(tokens)
    expected = run(exact, targets, temperature, "naive", parts=parts)
    for dtype, close in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        actual = run(exact, targets, temperature, dtype=dtype, parts=parts)
        for ours, theirs in zip(actual, expected, strict=True):
            assert ours.dtype == dtype
            torch.testing.assert_close(ours.double(), theirs, rtol=close, atol=close)


@needs_triton
def test_only_wanted_gradients_are_computed(small_steps):
    hidden, weight, targets = problem(9)
    expected = run((hidden, weight), targets, backend="naive", parts=NAMES[:1])
    for wanted in (0, 1):
        inputs = [one.clone().requires_grad_(place == wanted) for place, one in enumerate((hidden, weight))]
        rows_T = torch.linspace(-1.0, 2.0, 9, dtype=torch.float64, device=DEVICE)
        (rows_T * scores(*inputs, targets, backend="triton").logprobs_T).sum().backward()
        torch.testing.assert_close(inputs[wanted].grad, expected[3 + wanted])
        assert inputs[1 - wanted].grad is None


@needs_triton
def test_bfloat16_is_no_worse_than_full_logits():
    *exact, targets = problem(200, vocabulary=3000, hidden=64)
    rounded = [one.bfloat16() for one in exact]
    expected = run(rounded, targets, backend="naive")
    errors = []
    for backend in ("triton", "naive"):
        found = run(rounded, targets, backend=backend, dtype=torch.bfloat16)
        assert [one.dtype for one in found] == [torch.float32] * 3 + [torch.bfloat16] * 2
        errors.append([distance(one, other) for one, other in zip(found, expected, strict=True)])
    assert max(errors[0]) < 2e-2
    assert all(ours < 1.1 * theirs for ours, theirs in zip(*errors, strict=True))


def distance(actual, expected):
    return float((actual.double() - expected).norm() / expected.norm())


@needs_triton
def test_autocast_gives_float32_master_weights_an_unrounded_gradient():
    *exact, targets = problem(50, vocabulary=300, hidden=32)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = run(exact, targets, dtype=torch.float32)
    assert [one.dtype for one in found] == [torch.float32] * 5
    halves = run([one.bfloat16() for one in exact], targets, dtype=torch.bfloat16)
    torch.testing.assert_close(found[:3], halves[:3], rtol=0, atol=0)
    torch.testing.assert_close(found[4].bfloat16(), halves[4], rtol=0, atol=0)


@needs_triton
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # The interpreter is numpy, which remarks on every NaN.
def test_extreme_logits_stay_finite_and_a_bad_row_spoils_itself_only(small_steps):
    hidden, weight, targets = problem(5)
    found = run((hidden * 1e4, weight), targets, dtype=torch.float32)
    assert all(one.isfinite().all() for one in found)
    assert (found[1] >= 0).all()
    for bad in (float("nan"), float("inf")):
        hidden[2, 0] = bad
        for column in run((hidden, weight), targets, dtype=torch.float32)[:3]:
            assert column.isnan().tolist() == [False, False, True, False, False]


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from rollcast_learners import head_triton

columns = {"targets_C": "*i64", "vocabulary": "i32", "BLOCK": "constexpr"}
for kernel in (head_triton._score_row, head_triton._replace_by_gradient):
    types = {name: columns.get(name, "*fp32") for name in kernel.arg_names} | {"logits_CV": "*bf16"}
    source = ASTSource(kernel, types, constexprs={"BLOCK": head_triton.BLOCK})
    for generation in (80, 90, 100):
        made = triton.compile(source, GPUTarget("cuda", generation, 32), {"num_warps": head_triton.WARPS})
        print(len(made.asm["cubin"]))
"""


@needs_triton
def test_the_kernels_compile_for_ampere_hopper_and_blackwell(tmp_path):
    """No card is needed for that, and the interpreter takes what the compiler refuses."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 6


def test_without_a_gpu_it_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    inputs = [one.cpu() for one in problem(2)]
    with pytest.raises(ValueError, match=r'needs an NVIDIA GPU.*set learner.head to "chunked"'):
        head.scores(*inputs, backend="triton")
