"""Token ids -> text as it grows. Knows nothing of prompts, sampling or the model."""

import re
from collections.abc import Sequence
from functools import lru_cache

from transformers import PreTrainedTokenizerFast

# Tokens that the window keeps when it moves on. The first few may decode differently without those before them: half a
# character is cut off, or a leading blank goes. With this many, the last ones decode as they did.
CONTEXT = 24

# SentencePiece spells what its vocabulary lacks in bytes: <0xF0>, <0x9F>, ...
BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def split_stop_sequences(value: str | None) -> tuple[str, ...]:
    """The stop sequences that a user wrote with commas between; blanks are part of them, empty ones are dropped."""
    return tuple(part for part in (value or "").split(",") if part)


class Text:
    """The text of one answer: no special tokens, no leading blank, no half characters, nothing from a stop sequence on.

    Joined, what `add` and `end` return is the decoding of all tokens at once, without its leading blank and without an
    incomplete last character, up to where the first stop sequence begins. How the tokens were spread over the calls
    makes no difference.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stop_sequences: Sequence[str] = ()) -> None:
        self.stopped = False  # a stop sequence has appeared: the text is complete
        self._stop_sequences = tuple(stop_sequences)
        self._characters = _Characters(tokenizer)
        self._held = ""  # not shown yet: it may be the beginning of a stop sequence
        self._begun = False

    def add(self, tokens: Sequence[int]) -> str:
        """Take the next tokens; return the text that may be shown now, "" while it is held back or after the end."""
        return "" if self.stopped else self._show(self._characters.add(tokens), last=False)

    def end(self) -> str:
        """Return all that is still held back: no more tokens come."""
        return "" if self.stopped else self._show(self._characters.end(), last=True)

    def _show(self, text: str, last: bool) -> str:
        held = self._held + text
        if not self._begun:
            held = held.lstrip()
            self._begun = bool(held)
        ready = len(held) if last else self._unfinished(held)
        found = min((at for stop in self._stop_sequences if (at := held.find(stop)) >= 0), default=len(held))
        # another stop sequence that began before this one may still be completed by what comes
        self.stopped = found < len(held) and found <= ready
        if self.stopped:
            self._held = ""
            return held[:found]
        self._held = held[ready:]
        return held[:ready]

    def _unfinished(self, held: str) -> int:
        """Where the longest suffix of `held` that could begin a stop sequence starts."""
        longest = max(map(len, self._stop_sequences), default=0)
        for at in range(max(0, len(held) - longest + 1), len(held)):
            end = held[at:]
            if any(stop.startswith(end) for stop in self._stop_sequences):
                return at
        return len(held)


class _Characters:
    """Token ids -> whole characters. It decodes a window of the last tokens, so a token's cost does not grow."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._special = _special_tokens(tokenizer)
        self._window: list[int] = []
        self._read = 0  # characters of the window's text that were returned
        self._in_bytes = False

    def add(self, tokens: Sequence[int]) -> str:
        for token in tokens:
            name = self._backend.id_to_token(token)
            if name is not None and name not in self._special:
                self._window.append(token)
                self._in_bytes = BYTE_TOKEN.fullmatch(name) is not None
        # one bad byte turns its whole run of byte tokens into replacement characters: wait until the run is over
        if self._in_bytes:
            return ""
        text = self._decode(self._window)
        # an incomplete character decodes as one replacement character at the end
        ready = len(text) - text.endswith("\ufffd")
        fresh = text[self._read : ready]
        self._read = ready
        self._move_on(text)
        return fresh

    def end(self) -> str:
        """Return what is left, without an incomplete last character."""
        text = self._decode(self._window)
        if self._in_bytes:
            # a character has up to four bytes, and an incomplete one spoils the whole run
            ends = (self._decode(self._window[: len(self._window) - cut]) for cut in range(4))
            text = next((whole for whole in ends if not whole.endswith("\ufffd")), text)
        return text.removesuffix("\ufffd")[self._read :]

    def _decode(self, tokens: list[int]) -> str:
        return str(self._backend.decode(tokens, skip_special_tokens=True))

    def _move_on(self, text: str) -> None:
        if len(self._window) > 2 * CONTEXT:
            unread = len(text) - self._read
            self._window = self._window[-CONTEXT:]
            self._read = len(self._decode(self._window)) - unread


@lru_cache(maxsize=1)
def _special_tokens(tokenizer: PreTrainedTokenizerFast) -> frozenset[str]:
    return frozenset(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
