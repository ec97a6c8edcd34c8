"""`rollcast/Translation-v0`: one sentence in one language, its translation in another, rewarded by chrF or BLEU.

Owns: which languages, the wording, and the reward. Does not know where the sentences come from
(`rollcast_envs/data/translation/SOURCE.md` does) nor how a translation is measured (`rollcast_envs.rewards`).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from rollcast_envs.corpus import corpus_bleu, corpus_chrf
from rollcast_envs.errors import DataError
from rollcast_envs.records import Field, Record, open_records
from rollcast_envs.rewards import bleu, chrf
from rollcast_envs.tasks.single_turn import SingleTurnTask, Verdict
from rollcast_envs.text import Answered, CorpusFigure

LANGUAGES = {"de": "German", "en": "English", "es": "Spanish", "fr": "French", "it": "Italian", "pt": "Portuguese"}
"""Names for the system turn; any other language is called as the user writes it."""
MEASURES = {"chrf": chrf, "bleu": bleu}


class TranslationEnv(SingleTurnTask):
    """Sentences of user interfaces, translated by people, between English and German, Spanish or French.

    Reward: sentence chrF (or BLEU, effective order) against the best reference, in [0, 1]. Copying the source earns
    about 0.25 chrF between these languages: whoever reports a score should report that one beside it. Evaluation adds
    corpus BLEU and chrF with sacrebleu's signatures.

    Args:
        source: language of the question; with the built-in data, "en" or the other language of a pair.
        target: language of the answer.
        reward: "chrf" or "bleu".
        data: your own pairs, with the fields `source` and `target` (a string, or a list of accepted translations).
        system_prompt: None for "Translate SOURCE to TARGET.".
        split, fields, few_shot: as for every task (`SingleTurnTask`).
    """

    wanted = (
        Field("source", "text", "the text to translate"),
        Field("target", "texts", "its translations, the preferred one first"),
    )
    built_in = {code: f"translation/{code}.jsonl" for code in ("de", "es", "fr")}  # noqa: RUF012

    def __init__(
        self,
        split: str = "train",
        source: str = "en",
        target: str = "es",
        reward: Literal["chrf", "bleu"] = "chrf",
        data: str | Mapping[str, str] | None = None,
        fields: Mapping[str, str] | None = None,
        system_prompt: str | None = None,
        few_shot: int | Sequence[Sequence[str]] = 0,
    ) -> None:
        if reward not in MEASURES:
            raise ValueError(f"reward is {reward!r}; expected one of {', '.join(MEASURES)}")
        self.source, self.target, self.reward = source, target, reward
        said = f"Translate {_name(source)} to {_name(target)}." if system_prompt is None else system_prompt
        super().__init__(split, data, fields, said, few_shot)

    def open(self, split: str, data: str | Mapping[str, str] | None, fields: Mapping[str, str] | None) -> Any:
        if data is not None:
            return super().open(split, data, fields)
        pair = {self.source, self.target}
        if "en" not in pair or not (pair - {"en"}) <= self.built_in.keys() or len(pair) != 2:
            raise DataError(
                f"rollcast/Translation-v0 has no built-in sentences from {self.source!r} to {self.target!r}",
                f"they are between en and one of {', '.join(self.built_in)}",
                "name a file of your own with data=..., or one of these languages",
            )
        (other,) = pair - {"en"}
        return open_records(
            self._located(other), self.wanted, split=split, fields={"source": self.source, "target": self.target}
        )

    def question(self, record: Record, draw: np.random.Generator | None) -> str:
        return str(record["source"])

    def references(self, record: Record) -> list[str]:
        return list(record["target"])

    def judge(self, record: Record, answer: str) -> Verdict:
        said = answer.strip()
        metrics = {name: measure(said, record["target"]) for name, measure in MEASURES.items()}
        return Verdict({self.reward: metrics[self.reward]}, metrics)

    @classmethod
    def corpus_metrics(cls, answered: Sequence[Answered]) -> dict[str, CorpusFigure]:
        answers = [one.answer.strip() for one in answered]
        references = [list(one.references) for one in answered]
        figures = {"corpus_bleu": corpus_bleu, "corpus_chrf": corpus_chrf}
        return {name: CorpusFigure(*figure(answers, references)) for name, figure in figures.items()}


def _name(language: str) -> str:
    return LANGUAGES.get(language, language)
