"""The prompt ledger: every group of prompts is pending, leased, done, failed or skipped, and a journal says so.

Owns: which group is where, who holds it until when, and the journal file. Does not know what a prompt asks,
who plays it, or Ray.

A group (the samples of one question) is leased, finished and failed as one. A lease has a number of its own:
a result that comes with an expired lease is refused, so that nothing is trained twice. Deadlines use the
monotonic clock.

Journal lines: `{"event": "lease" | "return" | "done" | "failed" | "skipped" | "rollback", "group": n, ...}`. A
group that was trained in a step later than the checkpoint a run resumes from goes back to pending: its training
was lost with it.
"""

import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Lease:
    """Group `group` is worker `worker`'s until `deadline`. Ledger -> fleet."""

    id: int
    group: int
    worker: int
    deadline: float
    attempt: int


class Ledger:
    """State of every group issued so far; they are numbered from 0 in the order in which they are leased."""

    def __init__(
        self,
        journal: Path,
        lease_s: float,
        max_attempts: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.lease_s = lease_s
        self.max_attempts = max_attempts
        self._clock = clock
        self._leases: dict[int, Lease] = {}
        self._attempts: dict[int, int] = {}
        self._done: set[int] = set()
        self._failed: set[int] = set()
        self._skipped: set[int] = set()
        self._held: set[int] = set()
        self._pending: list[int] = []
        self._next_group = 0
        self._next_lease = 0
        self.refused = 0
        self._path = journal
        self._journal = journal.open("a", encoding="utf-8")
        if _is_torn(journal):
            self._journal.write("\n")  # What follows must not be glued to half a line and be lost with it.

    @classmethod
    def resume(cls, journal: Path, lease_s: float, max_attempts: int, step: int) -> "Ledger":
        """The ledger as it stood when the checkpoint of `step` was taken: later training is pending again."""
        ledger = cls(journal, lease_s, max_attempts)
        ledger.roll_back(step)
        return ledger

    def roll_back(self, step: int) -> None:
        """Stands as when the checkpoint of `step` was taken. What is leased or held is pending too: a result that is
        still on its way will be refused."""
        self._journal.flush()
        self._done, self._failed, self._skipped, highest = _replay(self._path, step)
        self._leases, self._attempts, self._held = {}, {}, set()
        settled = self._done | self._failed | self._skipped
        self._next_group = highest + 1
        self._pending = [group for group in range(self._next_group) if group not in settled]
        self._write("rollback", -1, step=step, pending=len(self._pending))

    def lease(self, worker: int) -> Lease:
        """The next pending group, or a new one, for `worker`."""
        if self._pending:
            group = self._pending.pop(0)
        else:
            group, self._next_group = self._next_group, self._next_group + 1
        attempt = self._attempts.get(group, 0) + 1
        lease = Lease(self._next_lease, group, worker, self._clock() + self.lease_s, attempt)
        self._next_lease += 1
        self._attempts[group] = attempt
        self._leases[lease.id] = lease
        self._write("lease", group, worker=worker, attempt=attempt)
        return lease

    def accept(self, lease: Lease) -> bool:
        """Whether a result under this lease counts; its group is then held until its fate is told."""
        if self._leases.get(lease.id) != lease:  # Numbers begin anew in a resumed run.
            self.refused += 1
            self._write("refused", lease.group, worker=lease.worker, attempt=lease.attempt)
            return False
        del self._leases[lease.id]
        self._held.add(lease.group)
        return True

    def trained(self, groups: Iterable[int], step: int) -> None:
        """These groups went into the update of `step`."""
        for group in groups:
            self._held.remove(group)
            self._done.add(group)
            self._write("done", group, step=step)
        self._journal.flush()

    def put_back(self, group: int, why: str) -> None:
        """A held group was not trained on (too old, say): it is to be played again."""
        self._held.remove(group)
        self._attempts[group] = 0
        self._pending.append(group)
        self._write("return", group, why=why)

    def fail(self, group: int, why: str) -> None:
        """A held group is given up: its episodes failed as often as they may."""
        self._held.remove(group)
        self._failed.add(group)
        self._write("failed", group, why=why)

    def skip(self, group: int, why: str) -> None:
        """A held group is left out, with nothing wrong in it."""
        self._held.remove(group)
        self._skipped.add(group)
        self._write("skipped", group, why=why)

    def release_worker(self, worker: int) -> list[Lease]:
        """A worker is gone: its leases return to pending."""
        lost = [lease for lease in self._leases.values() if lease.worker == worker]
        self._return(lost, "worker lost")
        return lost

    def hand_back(self, worker: int) -> list[Lease]:
        """A worker leaves before it was through: its leases return to pending, as if they had not been tried."""
        left = [lease for lease in self._leases.values() if lease.worker == worker]
        for lease in left:
            del self._leases[lease.id]
            self._attempts[lease.group] -= 1
            self._pending.append(lease.group)
            self._write("return", lease.group, why="worker left")
        return left

    def expire(self) -> list[Lease]:
        """Leases past their deadline return to pending; a late result will be refused."""
        now = self._clock()
        late = [lease for lease in self._leases.values() if lease.deadline <= now]
        self._return(late, "lease expired")
        return late

    def leased_to(self, worker: int) -> int:
        return sum(lease.worker == worker for lease in self._leases.values())

    def counts(self) -> dict[str, int]:
        """How many groups are where; what is played but not yet trained counts as leased."""
        return {
            "pending": len(self._pending),
            "leased": len(self._leases) + len(self._held),
            "done": len(self._done),
            "failed": len(self._failed),
        }

    @property
    def outstanding(self) -> int:
        """Groups with a worker or in the buffer."""
        return len(self._leases) + len(self._held)

    def flush(self) -> None:
        """Puts the journal on the disk; called before a checkpoint that relies on it is announced."""
        self._journal.flush()
        os.fsync(self._journal.fileno())

    def close(self) -> None:
        self._journal.close()

    def _return(self, leases: list[Lease], why: str) -> None:
        for lease in leases:
            del self._leases[lease.id]
            if lease.attempt >= self.max_attempts:
                self._failed.add(lease.group)
                self._write("failed", lease.group, why=f"{why} {lease.attempt} times")
            else:
                self._pending.append(lease.group)
                self._write("return", lease.group, why=why)

    def _write(self, event: str, group: int, **more: Any) -> None:
        self._journal.write(json.dumps({"event": event, "group": group, **more}) + "\n")


def _is_torn(journal: Path) -> bool:
    """Whether a crash left a last line without its end."""
    with journal.open("rb") as file:
        file.seek(max(journal.stat().st_size - 1, 0))
        return file.read() not in (b"", b"\n")


def _replay(journal: Path, step: int) -> tuple[set[int], set[int], set[int], int]:
    """(done by `step`, failed, skipped, highest group issued) as the journal tells. A torn last line is ignored."""
    done: dict[int, int] = {}
    settled: dict[str, set[int]] = {"failed": set(), "skipped": set()}
    highest = -1
    for line in journal.read_text(encoding="utf-8").splitlines() if journal.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        group = row["group"]
        highest = max(highest, group)
        if row["event"] == "done":
            done[group] = row["step"]
        elif row["event"] in settled:
            settled[row["event"]].add(group)
        elif row["event"] == "rollback":
            done = {g: s for g, s in done.items() if s <= row["step"]}
    return {g for g, s in done.items() if s <= step}, settled["failed"], settled["skipped"], highest
