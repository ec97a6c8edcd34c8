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
from rollcast_learners.batch import NO_ROW, collate
from rollcast_learners.policy import Policy, PolicySettings
from trajectories import answer, random_episodes

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
CPU = torch.device("cpu")

CASES = {
    "one sequence": [answer([1, 2, 3], [4, 5, 6])],
    "one-token answers": [answer([1, 2, 3], [4]), answer([1, 2, 3], [5], number=1), answer([9], [1], group="1")],
    "a system prompt": [
        answer([1, 2, 3, g], [4, 5 + n, 6], group=str(g), number=n) for g in range(4) for n in range(3)
    ],
    "a long family": [answer(list(range(30)), list(range(100 * n, 101 * n)), number=n) for n in (1, 9, 20)],
    "many sequences": [answer(list(range(1, n)), list(range(n)), group=str(n)) for n in range(2, 14)],
    "every form": random_episodes(2, groups=5),
}


@pytest.fixture(params=CASES, ids=lambda name: name.replace(" ", "-"))
def batch(request):
    return collate(CASES[request.param])


def seen_of(batch):
    """Which row sees which, by walking the segments upwards."""
    seen_TT = np.zeros((batch.tokens, batch.tokens), np.bool_)
    rows_of = [range(start, start + n) for start, n in zip(batch.segment_start_S, batch.segment_length_S, strict=True)]
    for segment, rows in enumerate(rows_of):
        seen_TT[rows.start : rows.stop, rows.start : rows.stop] = np.tri(len(rows), dtype=np.bool_)
        above = batch.segment_above_S[segment]
        while above != NO_ROW:
            seen_TT[rows.start : rows.stop, rows_of[above].start : rows_of[above].stop] = True
            above = batch.segment_above_S[above]
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


@pytest.mark.parametrize("joined", [256, 12, 0], ids=["joined", "some joined", "one a segment"])
def test_outputs_and_gradients_are_those_of_plain_calls(batch, joined, monkeypatch):
    monkeypatch.setattr(attention, "JOINED_ROWS", joined)
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
        batch = collate(
            [answer(list(range(60)), list(range(100 * k, 100 * k + n)), number=k) for k, n in enumerate(lengths)]
        )
        heads = [torch.randn(1, count, batch.tokens, 8, requires_grad=True) for count in (4, 2, 2)]
        output = kernel(*heads, block_mask=attention_flex.block_mask(batch, CPU), enable_gqa=True)
        output.sum().backward()
        counts.append(counter.frame_count)
    assert counts[-1] == counts[2] <= 3


def test_a_large_mask_is_never_laid_out():
    """64k rows: a mask of rows would be 4 GB, the table of blocks is 512 x 512."""
    first_T = np.arange(1 << 16)
    within_T = first_T % 8192  # Eight families of a prefix and seven tails, of 1,024 rows each.
    until_T = np.where(within_T < 1024, first_T - within_T + 8192, first_T // 1024 * 1024 + 1024)
    partial, whole = attention_flex.blocks_of(until_T.astype(np.int32))
    assert partial.shape == whole.shape == (512, 512)
    assert partial.sum() == 512  # Only the diagonal needs the rule.
    assert whole.sum() == 64 * 28 + 56 * 64  # What lies below it in each segment, and each tail's prefix.
