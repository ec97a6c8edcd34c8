"""Which policy counts as the best one, and who answers to a name. Pure.

Owns: what a passed gate, a promotion and a rollback do, the share of a canary, and what names mean. Does not know
engines, files, HTTP, or how good a policy is.

`latest` is the newest policy that the run published. `best` is the one that evaluation, or a person, chose last: the
run's gate (`best.json`) promotes by itself, and a rolled back version stays rolled back until evaluation finds a better
one. The candidate is `latest`, wherever it is not `best`: a canary sends it a share of what is asked of `best`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

REMEMBERED = 4
"""Best policies of before that a rollback can go back to."""
Alias = Literal["latest", "best"]


class NoSuchPolicy(ValueError):
    """What was asked for is not there, or cannot be; says what is."""


@dataclass(frozen=True)
class Releases:
    """What was chosen so far; as a file it outlives every replica."""

    best: int | None = None
    previous: tuple[int, ...] = ()
    """Best ones of before, the last one last."""
    gate: int = -1
    """The newest version that the run's evaluation found best and that was acted upon."""
    canary: float = 0.0
    """Share of what is asked of `best` that the candidate answers."""

    @property
    def kept(self) -> tuple[int, ...]:
        """Versions that must stay: the best one, and those that a rollback can go back to."""
        return self.previous if self.best is None else (*self.previous, self.best)

    def passed_gate(self, version: int) -> "Releases":
        """The run's evaluation found `version` best. Told again and again; counts once."""
        if version <= self.gate:
            return self
        return replace(self.promote(version), gate=version)

    def promote(self, version: int) -> "Releases":
        """`version` is the best one from now on."""
        if version == self.best:
            return self
        before = (*self.previous, self.best) if self.best is not None else self.previous
        kept = tuple(number for number in before if number != version)
        return replace(self, best=version, previous=kept[-REMEMBERED:])

    def rollback(self, version: int | None = None) -> "Releases":
        """Back to the best one before, or to `version` among them. Raises `NoSuchPolicy` when there is none."""
        if not self.previous:
            raise NoSuchPolicy("there is no best policy of before to go back to")
        target = self.previous[-1] if version is None else version
        if target not in self.previous:
            known = ", ".join(map(str, self.previous))
            raise NoSuchPolicy(f"version {version} was not the best one before; {known} can be gone back to")
        return replace(self, best=target, previous=self.previous[: self.previous.index(target)])

    def with_canary(self, share: float) -> "Releases":
        """`share` of what is asked of `best` goes to the candidate."""
        return replace(self, canary=share)


def aliases(latest: int | None, best: int | None) -> dict[str, int]:
    """What names mean where these versions are resident: `latest`, `best`, and `candidate` where they differ."""
    named = {"latest": latest, "best": best, "candidate": latest if latest != best and best is not None else None}
    return {name: version for name, version in named.items() if version is not None}


def engine_for(asked: str, resident: Mapping[str, int], canary: float, draw: float) -> Alias:
    """Which engine answers to the alias or version `asked`, one of `resident`. `draw` is uniform in [0, 1).

    A version that both hold is answered by the best one's: that engine stays with it.
    """
    if asked == "best" and "candidate" in resident and draw < canary:
        return "latest"
    if asked == "best" or (asked.isdigit() and resident.get("best") == int(asked)):
        return "best"
    return "latest"
