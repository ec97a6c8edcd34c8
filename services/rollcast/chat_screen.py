"""`rollcast chat`: a conversation in the terminal, with the policy version that said each answer, and feedback.

Owns: what lines mean and what is shown. Does not know HTTP (`talk.py`) or where lines come from: a function reads one.
"""

import time
from collections.abc import Callable

from rich.console import Console

from rollcast.display import harmless_lines
from rollcast.errors import RollcastError
from rollcast.talk import Answered, Message, PolicyClient

HELP = """\
Type a question. Lines that begin with / are commands:
  /good, /bad       say what the last answer was worth
  /score 0.8        the same, from 0 to 1
  /edit TEXT        what the last answer should have been
  /again            ask the last question once more; /better and /worse then compare the two answers
  /system TEXT      set the system turn and begin anew
  /model NAME       policy, policy@best or policy@VERSION
  /new              begin a new conversation
  /quit             leave (also Ctrl-D); Ctrl-C cuts an answer off"""


class Chat:
    """One conversation. `handle` takes a line and returns False when it is over."""

    def __init__(
        self, policy: PolicyClient, console: Console, model: str = "policy", system: str | None = None
    ) -> None:
        self.policy, self.console, self.model, self.system = policy, console, model, system
        self.turns: list[Message] = []
        self.last: Answered | None = None
        self.before: Answered | None = None
        """The answer to the same question before the last one."""

    def run(self, read_line: Callable[[], str]) -> None:
        """Until the person leaves."""
        try:
            while self.handle(read_line()):
                pass
        except EOFError:
            self.console.print()

    def handle(self, line: str) -> bool:
        """Does what a line says. A refusal is shown, and the conversation goes on."""
        word, _, rest = line.strip().partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "/good": lambda _: self._feedback(thumb="up"),
            "/bad": lambda _: self._feedback(thumb="down"),
            "/score": self._score,
            "/edit": self._edit,
            "/again": lambda _: self._again(),
            "/better": lambda _: self._compare(better=True),
            "/worse": lambda _: self._compare(better=False),
            "/system": self._set_system,
            "/model": self._set_model,
            "/new": lambda _: self._begin(),
            "/help": lambda _: self.console.print(HELP),
        }
        if word == "/quit":
            return False
        try:
            if word in commands:
                commands[word](rest.strip())
            elif word.startswith("/"):
                self._note(f"there is no command {word}; /help lists them")
            elif word:
                self._ask([*self.turns, {"role": "user", "content": line.strip()}])
        except RollcastError as error:
            self._note(f"{error.what} {error.why} {error.fix}")
        return True

    def _ask(self, turns: list[Message], same_question: bool = False) -> None:
        opening = [{"role": "system", "content": self.system}] if self.system else []
        started, answered = time.monotonic(), None
        pieces = self.policy.ask([*opening, *turns], self.model)
        try:
            for piece in pieces:
                if isinstance(piece, Answered):
                    answered = piece
                else:
                    self.console.print(harmless_lines(piece), end="", soft_wrap=True)
        except KeyboardInterrupt:
            self.console.print()
            self._note("cut off")
            return
        finally:
            pieces.close()  # type: ignore[attr-defined]
        self.console.print()
        if answered is not None:
            self.before = self.last if same_question else None
            self.last = answered
            self.turns = [*turns, {"role": "assistant", "content": answered.text}]
            self._note(f"{_versions(answered)}, {time.monotonic() - started:.1f} s")

    def _again(self) -> None:
        if not self.turns:
            self._note("nothing was asked yet")
        else:
            self._ask(self.turns[:-1], same_question=True)

    def _compare(self, better: bool) -> None:
        if self.last is None or self.before is None:
            self._note("there are no two answers to one question; /again asks for a second one")
            return
        first, second = (self.last, self.before) if better else (self.before, self.last)
        self.policy.feedback(first.id, preferred_to=second.id)
        self._note("noted: the last answer is the better one" if better else "noted: the one before is the better one")

    def _feedback(self, **said: object) -> None:
        if self.last is None:
            self._note("there is no answer yet to speak of")
            return
        self.policy.feedback(self.last.id, **said)
        self._note(f"noted: {', '.join(f'{kind} {value}' for kind, value in said.items())}")

    def _score(self, text: str) -> None:
        try:
            self._feedback(score=float(text))
        except ValueError:
            self._note("write a number from 0 to 1, as /score 0.8")

    def _edit(self, text: str) -> None:
        if text:
            self._feedback(edit=text)
        else:
            self._note("write what the answer should have been, as /edit TEXT")

    def _set_system(self, text: str) -> None:
        self.system = text or None
        self._begin()

    def _set_model(self, name: str) -> None:
        self.model = name or "policy"
        self._note(f"from now on {self.model} answers")

    def _begin(self) -> None:
        self.turns, self.last, self.before = [], None, None
        self._note("a new conversation")

    def _note(self, text: str) -> None:
        self.console.print(harmless_lines(text), style="dim", soft_wrap=True)


def _versions(answered: Answered) -> str:
    oldest, newest = answered.versions
    return f"policy version {newest}" if oldest == newest else f"policy versions {oldest} to {newest}"
