"""Text of a growing row of tokens: whole characters only, cut exactly where a stop string begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmfast.data import Tokenizer

__all__ = ["TextTail"]


class TextTail:
    """Takes token ids, gives text that is final: never part of a character, never part of a stop string.

    The stop string that is complete first counts (of several that end at once, the longest), whatever the tokens'
    borders, and neither it nor anything after it is given out.

    Attributes:
        stopped: a stop string has appeared.

    Raises:
        ValueError: a stop string is empty.

    Example:
        >>> tail = TextTail(tokenizer, ["\\n\\n"])
        >>> text = "".join(tail.feed(token) for token in ids) + tail.finish()
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: str | Sequence[str] | None = None) -> None:
        stop_strings = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings or [])
        if not all(stop_strings):
            raise ValueError("stop_strings: got an empty string, expected at least one character in each")
        self._stops = stop_strings
        self._decoder = tokenizer.stream_decoder()
        self._held = ""
        self.stopped = False

    def feed(self, token: int) -> str:
        """The text that `token` makes final; perhaps none."""
        return "" if self.stopped else self._take(self._decoder.feed(token))

    def finish(self) -> str:
        """What was held back, once there are no more tokens."""
        if self.stopped:
            return ""
        text = self._take(self._decoder.finish())
        held, self._held = self._held, ""
        return text if self.stopped else text + held

    def _take(self, piece: str) -> str:
        text = self._held + piece
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        final = len(text) - self._unfinished(text)
        self._held = text[final:]
        return text[:final]

    def _unfinished(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        longest = min(len(text), max(map(len, self._stops), default=1) - 1)
        return next((n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in self._stops)), 0)
