"""The attention of GPUs, told on a CPU: the same rows see the same rows, and outputs and gradients are the same.

flex_attention is not compiled here: torch then computes it plainly, from the very mask and with a backward pass.
"""

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention as flex
from torch.testing import assert_close

from rollcast_learners import attention, attention_flex
from rollcast_learners.batch import collate
from rollcast_learners.policy import Policy, PolicySettings
from trajectories import answer, random_episodes

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
CPU = torch.device("cpu")

CASES = {
    "one sequence": [answer([1, 2, 3], [4, 5, 6])],
    "one-token answers": [answer([1, 2, 3], [4]), answer([1, 2, 3], [5], number=1), answer([9], [1], group="1")],
    "a long family": [answer(list(range(30)), list(range(n)), number=n) for n in (1, 9, 20)],
    "many sequences": [answer(list(range(1, n)), list(range(n)), group=str(n)) for n in range(2, 14)],
    "every form": random_episodes(2, groups=5),
}


@pytest.fixture(params=CASES, ids=lambda name: name.replace(" ", "-"))
def batch(request):
    return collate(CASES[request.param])


def seen_of(batch):
    """Which row sees which, by the other form's masks: families along the diagonal."""
    seen_TT = np.zeros((batch.tokens, batch.tokens), np.bool_)
    for prefix, (start, length) in enumerate(zip(batch.prefix_start_P, batch.prefix_length_P, strict=True)):
        tails = batch.tail_length_S[batch.tail_prefix_S == prefix].tolist()
        end = start + length + sum(tails)
        seen_TT[start:end, start:end] = attention.family_mask(int(length), tails)
    return seen_TT


@pytest.mark.parametrize("block", [4, 7, 128])
def test_rule_and_blocks_are_those_of_the_masks(batch, block, monkeypatch):
    monkeypatch.setattr(attention_flex, "BLOCK", block)
    made = attention_flex.block_mask(batch, CPU)
    rule = flex.create_mask(made.mask_mod, 1, 1, batch.tokens, batch.tokens, device="cpu")[0, 0]
    assert np.array_equal(rule.numpy(), seen_of(batch))
    slow = flex.create_block_mask(made.mask_mod, 1, 1, batch.tokens, batch.tokens, device="cpu", BLOCK_SIZE=block)
    assert made.shape == slow.shape
    for ours, theirs in zip(listed(made), listed(slow), strict=True):
        assert ours == theirs


def listed(mask):
    """The blocks of each block of rows, and the rows of each block, in part and whole."""
    pairs = (
        (mask.kv_num_blocks, mask.kv_indices),
        (mask.full_kv_num_blocks, mask.full_kv_indices),
        (mask.q_num_blocks, mask.q_indices),
        (mask.full_q_num_blocks, mask.full_q_indices),
    )
    for counts, indices in pairs:
        yield [row[:count].tolist() for count, row in zip(counts[0, 0].tolist(), indices[0, 0], strict=True)]


@pytest.mark.parametrize("largest", [1024, 0], ids=["masked", "large"])
def test_outputs_and_gradients_are_those_of_plain_calls(batch, largest, monkeypatch):
    monkeypatch.setattr(attention, "LARGEST_MASKED_FAMILY", largest)
    # torch refuses gradients on a CPU for want of a fast kernel; the plain one has them.
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)
    generator = torch.Generator().manual_seed(1)
    heads = [torch.randn(1, count, batch.tokens, 8, generator=generator, requires_grad=True) for count in (4, 2, 2)]
    weights = torch.randn(1, batch.tokens, 4, 8, generator=generator)
    results = []
    for packing in (attention_flex.block_mask(batch, CPU), attention.pieces_of(batch, torch.float32, CPU)):
        output, _ = attention.packed_attention(torch.nn.Identity(), *heads, None, packing, scaling=0.3)
        results.append((output, *torch.autograd.grad((output * weights).sum(), heads)))
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_whole_model_says_the_same(tiny_fp32, monkeypatch):
    policy, batch = Policy(PolicySettings(tiny_fp32, "float32")), collate(random_episodes(5))
    with torch.no_grad():
        plain = policy.hidden(batch)
        monkeypatch.setattr(attention, "packing_of", lambda batch, _, device: attention_flex.block_mask(batch, device))
        assert_close(policy.hidden(batch), plain, rtol=1e-5, atol=1e-5)


def test_batches_of_any_length_share_what_was_compiled(monkeypatch):
    """Each compilation costs seconds on a GPU, and no two micro-batches have the same number of rows."""
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    kernel = torch.compile(flex.flex_attention, fullgraph=True, backend=counter)
    counts = []
    for lengths in ([200, 90], [130, 220], [300, 7, 8], [129, 129], [61, 300], [257, 256, 300]):
        batch = collate([answer(list(range(1, 60)), list(range(n)), number=k) for k, n in enumerate(lengths)])
        heads = [torch.randn(1, count, batch.tokens, 8, requires_grad=True) for count in (4, 2, 2)]
        output = kernel(*heads, block_mask=attention_flex.block_mask(batch, CPU), enable_gqa=True)
        output.sum().backward()
        counts.append(counter.frame_count)
    assert counts[-1] == counts[2] <= 3


def test_a_large_mask_is_never_laid_out():
    """64k rows: a mask of rows would be 4 GB, the table of blocks is 512 x 512."""
    lengths = np.full(64, 1024)
    starts = np.arange(64) * 1024
    family = starts // 8192 * 8192
    first = starts == family
    stops = np.where(first, 0, family + 1024)
    partial, whole = attention_flex.blocks_of(
        attention_flex.Segments(starts, lengths, np.where(first, 0, family), stops)
    )
    assert partial.shape == whole.shape == (512, 512)
    assert partial.sum() == 512  # Only the diagonal needs the rule.
    assert whole.sum() == 64 * 28 + 56 * 64  # What lies below it in each segment, and each tail's prefix.
