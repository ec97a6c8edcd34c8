"""Packed against padded: one learner's forward and backward on answers of very unequal length. Prints JSON.

    python benchmarks/packing.py [--pairs 5] [--write]

Both sides have the same model, weights in bfloat16, samples (64 prompts of their own, so that packing shares nothing),
micro-batches, head and loss, and look at no prompt row in the head. Padded, the samples of a micro-batch are the rows
of one rectangle, sorted by length or not, and go through transformers' own attention. `fill` is the share of the
rectangle that is not padding; speed in proportion to it would be 1 / fill. Quality: the largest difference of the two
sides' log-probabilities, in float32.
"""

import argparse
import json
from typing import Any

import numpy as np
from learner import MODEL, PROMPT_TOKENS, model_folder, our_learner, trajectory
from measuring import THREADS, Turns, child, finish, machine

SAMPLES, ROWS = 64, 16
MEDIAN, SIGMA, SHORTEST, LONGEST = 24, 1.0, 2, 256
MICROBATCH_TOKENS = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="also write benchmarks/results/packing-DATE.json")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.pairs)))
        return
    finish("packing", machine() | child(__file__, "--pairs", str(options.pairs), "--child"), options.write)


def samples() -> list[Any]:
    rng = np.random.default_rng(0)
    lengths = np.clip(np.round(rng.lognormal(np.log(MEDIAN), SIGMA, SAMPLES)), SHORTEST, LONGEST).astype(int)
    words = lambda count: rng.integers(100, 49000, count)  # noqa: E731
    return [trajectory(str(n), n, words(PROMPT_TOKENS), words(length), 1.0) for n, length in enumerate(lengths)]


class Padded:
    """The samples as rectangles of `ROWS` samples, through transformers' own attention."""

    def __init__(self, model: str, dtype: str, trajectories: list[Any]) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.lm = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype), attn_implementation="sdpa")
        self.streams = [item.streams[0] for item in trajectories]

    def rectangles(self, in_order: bool) -> list[list[Any]]:
        streams = sorted(self.streams, key=lambda s: len(s.token_ids_T)) if in_order else self.streams
        return [streams[start : start + ROWS] for start in range(0, len(streams), ROWS)]

    def slots(self, in_order: bool) -> int:
        return sum(len(part) * max(len(s.token_ids_T) for s in part) for part in self.rectangles(in_order))

    def logprobs(self, part: list[Any]) -> Any:
        """Of the trained tokens of one rectangle, one sample after the other."""
        import torch

        from rollcast_learners.head import scores

        longest = max(len(s.token_ids_T) for s in part)
        ids = torch.zeros(len(part), longest, dtype=torch.long)
        seen, before = torch.zeros_like(ids), torch.zeros(len(part), longest, dtype=torch.bool)
        for row, stream in enumerate(part):
            length = len(stream.token_ids_T)
            ids[row, :length] = torch.from_numpy(stream.token_ids_T.astype(np.int64))
            seen[row, :length] = 1
            before[row, : length - 1] = torch.from_numpy(stream.trained_T[1:])
        hidden = self.lm.base_model(input_ids=ids, attention_mask=seen, use_cache=False).last_hidden_state
        targets = ids.roll(-1, 1)[before]
        return scores(hidden[before], self.lm.get_output_embeddings().weight, targets).logprobs_T

    def once(self, in_order: bool) -> None:
        self.lm.zero_grad()
        for part in self.rectangles(in_order):
            self.logprobs(part).sum().backward()


def measure(pairs: int) -> dict[str, Any]:
    import tempfile
    from pathlib import Path

    import torch

    from rollcast_learners.batch import collate

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    trajectories = samples()
    batch = collate(trajectories)
    with tempfile.TemporaryDirectory(prefix="rollcast-bench-") as spare:
        model = model_folder(str(MODEL), Path(spare))
        difference = quality(model, trajectories)
        policy, padded = our_learner(model).policy, Padded(model, "bfloat16", trajectories)

    def packed() -> None:
        policy.zero_grad()
        for episodes in batch.microbatches(MICROBATCH_TOKENS):
            policy(batch.select(episodes)).logprobs_N.sum().backward()

    sides = {"packed": packed, "padded": lambda: padded.once(False), "padded_sorted": lambda: padded.once(True)}
    turns = Turns(sides, pairs)
    compared = {}
    for name, in_order in (("padded", False), ("padded_sorted", True)):
        fill = batch.tokens / padded.slots(in_order)
        compared[f"{name}_over_packed"] = {
            **turns.ratio(name, "packed"),
            "fill": round(fill, 3),
            "target": round(0.9 / fill, 3),
        }
    return {"rows": batch.tokens, **turns.seconds(), **compared, "max_logprob_difference_fp32": difference}


def quality(model: str, trajectories: list[Any]) -> float:
    import torch

    from rollcast_learners.batch import collate

    some = trajectories[:ROWS]
    with torch.no_grad():
        ours = our_learner(model, "float32").policy(collate(some)).logprobs_N
        theirs = Padded(model, "float32", some).logprobs([item.streams[0] for item in some])
    return float((ours - theirs).abs().max())


if __name__ == "__main__":
    main()
