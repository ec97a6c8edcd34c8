"""`rollcast/Summarization-v0`: a text, and one sentence that stands for it, rewarded by ROUGE.

Owns: the wording, the reward, and the term that stops a policy from copying its input. Does not know where the texts
come from (`rollcast_envs/data/summarization/SOURCE.md` does) nor how ROUGE is computed (`rollcast_envs.rewards`).
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from rollcast_envs.records import Field, Record
from rollcast_envs.rewards import TextTooLong, rouge
from rollcast_envs.tasks.single_turn import SingleTurnTask, Verdict

KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")


class SummarizationEnv(SingleTurnTask):
    """Descriptions from the documentation of scientific packages and cloud services, and their one-sentence summaries.

    Reward: ROUGE F-measure against the best reference, in [0, 1], less `copy_cost` times the share by which the answer
    is longer than `max_share` of the document (in characters). So the whole document as the answer loses half a point
    by default, and a summary of ordinary length loses nothing.

    Args:
        reward: "rouge1", "rouge2", "rougeL" or "rougeLsum".
        max_share: the longest answer that costs nothing, as a share of the document's length.
        copy_cost: reward lost for each document's length beyond it.
        tokenizer: None for rouge_score's own, which sees ASCII letters and digits only; "characters" or "words" for
            languages that it cannot see.
        data: your own texts, with the fields `document` and `references` (a string, or a list).
        split, fields, system_prompt, few_shot: as for every task (`SingleTurnTask`).
    """

    wanted = (
        Field("document", "text", "the text to summarize"),
        Field("references", "texts", "summaries, the preferred one first"),
    )
    built_in = {"docs": "summarization/records.jsonl"}  # noqa: RUF012

    def __init__(
        self,
        split: str = "train",
        reward: str = "rougeL",
        max_share: float = 0.5,
        copy_cost: float = 1.0,
        tokenizer: str | None = None,
        data: str | Mapping[str, str] | None = None,
        fields: Mapping[str, str] | None = None,
        system_prompt: str | None = "Summarize the text in one short sentence.",
        few_shot: int | Sequence[Sequence[str]] = 0,
    ) -> None:
        if reward not in KINDS:
            raise ValueError(f"reward is {reward!r}; expected one of {', '.join(KINDS)}")
        for name, value in (("max_share", max_share), ("copy_cost", copy_cost)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} is {value}; expected a finite number that is not negative")
        self.reward, self.max_share, self.copy_cost, self.tokenizer = reward, max_share, copy_cost, tokenizer
        super().__init__(split, data, fields, system_prompt, few_shot)

    def question(self, record: Record, draw: np.random.Generator | None) -> str:
        return str(record["document"])

    def references(self, record: Record) -> list[str]:
        return list(record["references"])

    def judge(self, record: Record, answer: str) -> Verdict:
        metrics = {kind: self._rouge(record, answer, kind) for kind in KINDS}
        share = len(answer) / max(len(record["document"]), 1)
        copied = self.copy_cost * max(share - self.max_share, 0.0)
        return Verdict({self.reward: metrics[self.reward], "copying": -copied}, metrics | {"length_share": share})

    def _rouge(self, record: Record, answer: str, kind: str) -> float:
        """An answer too long to be compared is no summary."""
        try:
            return rouge(answer, record["references"], kind, self.tokenizer)
        except TextTooLong:
            return 0.0
