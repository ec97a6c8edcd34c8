"""Tokens to text while an answer grows: whole characters only, and nothing of a stop text.

Owns: what of an answer may leave now, and where it ends. Does not know engines, HTTP or policies.
"""

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]
"""Token ids to text, without special tokens."""
BROKEN = "\ufffd"
LONGEST_CHARACTER = 16
"""Tokens after which what decodes to no whole character leaves as it is."""


class GrowingText:
    """The text of one answer; `ended` is set once a stop text was met."""

    def __init__(self, decode: Decode, stops: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stops = tuple(stops)
        self._ids: list[int] = []
        # Tokens are decoded with a few before them, since some tokenizers write a word by what precedes it.
        self._context = self._read = 0
        self._text = ""
        self._left = 0
        self.ended = False

    @property
    def text(self) -> str:
        """Everything so far, up to the stop text if one was met."""
        return self._text

    def add(self, token_id: int) -> str:
        """One more token; returns what may leave now. Nothing is added any more once a stop text was met."""
        if self.ended:
            return ""
        self._ids.append(token_id)
        new = self._new()
        if new.endswith(BROKEN) and len(self._ids) - self._read < LONGEST_CHARACTER:
            return ""
        return self._take(new)

    def finish(self) -> str:
        """The answer is over: returns what had been held back, such as the beginning of a stop text."""
        last = "" if self.ended else self._take(self._new())
        return last + self._leave(len(self._text))

    def _new(self) -> str:
        before = self._decode(self._ids[self._context : self._read])
        return self._decode(self._ids[self._context :])[len(before) :]

    def _take(self, new: str) -> str:
        self._context, self._read = self._read, len(self._ids)
        return self._grow(new)

    def _grow(self, new: str) -> str:
        searched = max(0, len(self._text) - max((len(stop) for stop in self._stops), default=0))
        self._text += new
        found = [place for stop in self._stops if (place := self._text.find(stop, searched)) >= 0]
        if found:
            self._text, self.ended = self._text[: min(found)], True
            return self._leave(len(self._text))
        return self._leave(len(self._text) - self._held())

    def _held(self) -> int:
        """Characters at the end that may turn out to begin a stop text."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(self._text)), longest, -1):
                if self._text.endswith(stop[:length]):
                    longest = length
                    break
        return longest

    def _leave(self, upto: int) -> str:
        new = self._text[self._left : upto]
        self._left = max(self._left, upto)
        return new
