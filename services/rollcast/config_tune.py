"""`[tune]`: what a search over settings tries.

Owns: its keys and which of them contradict each other. Does not know how trials are run (`tune.py`).
"""

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from rollcast.section import AtLeastOne, NotNegative, Section, refusal

NOT_WITH_FOLDS = re.compile(r"eval\.split|env\.\d+\.kwargs\.split|run\.steps|tune\..*")
"""Settings that folds make themselves, and those without which they could not be compared."""


class Span(Section):
    """All numbers between two, for a search that draws."""

    low: float
    """The smallest."""
    high: float
    """The largest; whole numbers are drawn where both ends are whole."""
    log: bool = False
    """Whether each order of magnitude is drawn as often as the others."""


class TuneSection(Section):
    """What `rollcast tune` tries."""

    space: dict[str, Annotated[tuple[Any, ...], Field(min_length=1, strict=False)] | Span] = Field(default_factory=dict)
    """Settings to vary: `"learner.learning_rate" = [1e-5, 3e-5]`, or `{ low = 1e-6, high = 1e-4, log = true }`."""
    search: Literal["grid", "random", "asha"] = "grid"
    """Every combination; as many as drawn; or drawn, and the worse half ended early again and again (ASHA)."""
    trials: AtLeastOne = 8
    """Combinations that random and asha draw."""
    concurrent: AtLeastOne = 1
    """Trials at a time; each is a run that asks for workers and learners of its own."""
    metric: Annotated[str, Field(pattern=r"^[^/]+/.+$")] | None = None
    """The figure to raise, such as `QA-v0/f1`; without it eval.best_metric, or else the first environment's reward."""
    seeds: AtLeastOne = 1
    """Runs of each combination, with one seed after the other; their mean counts (not with asha)."""
    folds: NotNegative = 0
    """Parts of train for k-fold validation: a run for each, trained on the others, measured on it; 0 or 1: none."""

    @field_validator("space", mode="before")
    @classmethod
    def _dotted(cls, space: object) -> object:
        """`learner.clip_high = [...]` without quotes is a table in a table to TOML."""
        if not isinstance(space, Mapping):
            return space
        flat = dict(_flat(space))
        for key, values in flat.items():
            if not isinstance(values, list | tuple | Mapping | Span):
                fix = "write a list, or { low = 1e-6, high = 1e-4, log = true }"
                raise refusal("tune.space", f"{key} is {values!r}: one value is no choice", fix)
        return flat

    @model_validator(mode="after")
    def _fits_together(self) -> "TuneSection":
        spans = [key for key, values in self.space.items() if isinstance(values, Span)]
        for key in spans:
            span = self.space[key]
            assert isinstance(span, Span)
            if not span.low < span.high or (span.log and span.low <= 0):
                orders = " by orders of magnitude" if span.log else ""
                why = f"{key}: there are no numbers between {span.low:g} and {span.high:g}{orders}"
                raise refusal("tune.space", why, "write { low = 1e-6, high = 1e-4, log = true }")
        if self.search == "grid" and spans:
            why = f"a grid has no end between the bounds of {spans[0]}"
            raise refusal("tune.search", why, 'list values there, or set it to "random" or "asha"')
        if self.search == "asha" and self.seeds > 1:
            raise refusal("tune.seeds", "asha judges a trial before its end, one run at a time", "set it to 1")
        if self.folds > 1 and (chosen := next(filter(NOT_WITH_FOLDS.fullmatch, self.space), None)):
            why = f"{chosen} cannot vary: tune.folds chooses the splits, and compares all runs at the same steps"
            raise refusal("tune.space", why, "leave it out of the space")
        return self


def _flat(space: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in space.items():
        if isinstance(value, Mapping) and not value.keys() & Span.model_fields.keys():
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value
