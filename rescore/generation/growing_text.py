"""The text of an output while its tokens come: what of it stays as it is, and where a stop string ends it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from lm.base.model import BaseLM

UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # what stands for the bytes of a character that is not whole yet
BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # a token that is one byte; a run of them is read as a whole
CLEANED = 8  # characters at the end that cleaning up spaces may still change (" n't" becomes "n't")


class GrowingText:
    """Takes the tokens of an output as they are accepted, by whatever blocks, and ends it at a stop string.

    The text is cut before the stop that begins first, as if the whole output were searched: one that could still be
    completed by the next tokens is waited for. Text that could be the beginning of a stop, or half a character, is held
    back from `stream`.

    token_ids: so far; those after the token that brought the stop are dropped.
    stopped: whether a stop was found.
    """

    def __init__(self, base: BaseLM, stop: Sequence[str] = (), stream: Callable[[str], object] | None = None) -> None:
        self._base, self._stop, self._stream = base, tuple(stop), stream
        self.token_ids: list[int] = []
        self.stopped = False
        self._text = ""  # that was found, if stopped
        self._streamed = ""

    def accepted(self, tokens: Sequence[int]) -> bool:
        """Takes the tokens of a step; whether the output goes on."""
        before = len(self.token_ids)
        self.token_ids += tokens
        text = self._settled(len(self.token_ids))
        if self._stop and self._stop_in(text) is not None:
            # The blocks that tokens come in must not show: the first token after which that was so is the last.
            counts = range(before + 1, len(self.token_ids) + 1)
            count, place = next((n, at) for n in counts if (at := self._stop_in(self._settled(n))) is not None)
            self._text = self._settled(count)[:place]
            self.stopped = True
            del self.token_ids[count:]
            return False
        self._show(text[: _may_begin(text, self._stop)])
        return True

    def finished(self) -> str:
        """The whole text, after the last token; streams what was held back."""
        if not self.stopped:
            self._text = self._base.decode_text(self.token_ids)
            places = [place for stop in self._stop if (place := self._text.find(stop)) >= 0]
            self.stopped = bool(places)
            self._text = self._text[: min(places)] if places else self._text
        self._show(self._text)
        return self._text

    def _stop_in(self, text: str) -> int | None:
        """Where the text is to be cut, if it is known that it is."""
        places = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        return min(places) if places and min(places) <= _may_begin(text, self._stop) else None

    def _settled(self, count: int) -> str:
        """The text of the first `count` tokens, as far as further ones leave it as it is."""
        tokenizer = self._base.tokenizer
        while count and BYTE.fullmatch(str(tokenizer.convert_ids_to_tokens(self.token_ids[count - 1]))):
            count -= 1
        text = self._base.decode_text(self.token_ids[:count])
        if getattr(tokenizer, "clean_up_tokenization_spaces", False):
            text = text[:-CLEANED]
        return text.removesuffix(UNKNOWN)

    def _show(self, text: str) -> None:
        """Streams what of a text was not streamed yet."""
        if self._stream is not None and len(text) > len(self._streamed) and text.startswith(self._streamed):
            self._stream(text[len(self._streamed) :])
            self._streamed = text


def _may_begin(text: str, stops: Sequence[str]) -> int:
    """Where the text's end begins that may be the beginning of a stop; its length if there is none."""
    longest = max(
        (next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0) for stop in stops), default=0
    )
    return len(text) - longest
