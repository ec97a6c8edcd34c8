"""The trajectory buffer between workers and learner: what may still be trained on, and how old it is.

Owns: played groups, their age in versions, and counts of what was dropped and why. Does not know the ledger,
workers or the learner; groups that it drops are handed back to the caller, who answers for them.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from rollcast_learners.batch import usable
from rollcast_learners.types import Trajectory


@dataclass(frozen=True, eq=False)
class PlayedGroup:
    """All samples of one question. Fleet -> buffer -> collate."""

    number: int
    trajectories: tuple[Trajectory, ...]

    @property
    def oldest_version(self) -> int:
        return min((v for t in self.trajectories for v in t.versions), default=0)

    @property
    def errors(self) -> list[str]:
        """Why samples of this group cannot be trained on."""
        return [t.error or "nothing was sampled, or not a finite number" for t in self.trajectories if not usable(t)]

    @property
    def usable(self) -> "PlayedGroup":
        """The group without them: a sample that failed is masked, and does not take the others with it."""
        return PlayedGroup(self.number, tuple(t for t in self.trajectories if usable(t)))

    def staleness(self, version: int) -> int:
        """Published version minus the oldest version in a sample."""
        return version - self.oldest_version


class ErrorShare:
    """Share of failed episodes among the last ones, and the first cause seen."""

    def __init__(self, window: int = 200) -> None:
        self._recent: deque[bool] = deque(maxlen=window)
        self.first_cause: str | None = None
        self.total = 0

    def add(self, group: PlayedGroup) -> None:
        errors = group.errors
        self._recent.extend(i < len(errors) for i in range(len(group.trajectories)))
        self.total += len(errors)
        if errors and self.first_cause is None:
            self.first_cause = errors[0]

    @property
    def seen(self) -> int:
        return len(self._recent)

    @property
    def share(self) -> float:
        return sum(self._recent) / len(self._recent) if self._recent else 0.0


@dataclass
class TrajectoryBuffer:
    """Groups that wait to be learned from. `expire` before every `take`: too old is dropped there, and counted."""

    groups_per_step: int
    max_staleness: int
    dropped_stale: int = 0
    _groups: deque[PlayedGroup] = field(default_factory=deque)

    def add(self, groups: Sequence[PlayedGroup]) -> None:
        self._groups.extend(groups)

    def clear(self) -> None:
        """Forgets all groups; they do not count as dropped."""
        self._groups.clear()

    def expire(self, version: int) -> list[PlayedGroup]:
        """Removes and returns what is more than `max_staleness` versions old at `version`."""
        old = [group for group in self._groups if group.staleness(version) > self.max_staleness]
        self._groups = deque(group for group in self._groups if group not in old)
        self.dropped_stale += sum(len(group.trajectories) for group in old)
        return old

    def ready(self) -> bool:
        return len(self._groups) >= self.groups_per_step

    def take(self) -> list[PlayedGroup]:
        """The groups of one step: those of the oldest policy first, whenever they arrived."""
        self._groups = deque(sorted(self._groups, key=lambda group: group.oldest_version))
        return [self._groups.popleft() for _ in range(self.groups_per_step)]

    def __len__(self) -> int:
        return len(self._groups)
