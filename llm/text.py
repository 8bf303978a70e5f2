"""Token ids -> text as it grows. Knows nothing of prompts, sampling or the model."""

import re
from collections.abc import Sequence
from functools import lru_cache

from transformers import PreTrainedTokenizerFast

# Tokens that a window keeps when it moves on. The first of them may decode otherwise than they did: as the rest of a
# character that was cut, or without the blank that only a text's beginning lacks. These are enough for the last not to.
CONTEXT = 24

# The bytes of what a SentencePiece vocabulary lacks: <0xF0>, <0x9F>, ...
BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def split_stop_sequences(value: str | None) -> tuple[str, ...]:
    """The stop sequences that a user wrote with commas between; blanks are part of them, empty ones are dropped."""
    return tuple(part for part in (value or "").split(",") if part)


class Text:
    """The text of one answer: no special tokens, no leading blank, no half characters, nothing from a stop sequence on.

    What `add` and `end` return, joined, is the one decode of all tokens, less its leading blank and a last character
    that lacks bytes, up to the first place where a stop sequence begins. It does not depend on how the tokens were
    dealt out over the calls.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stop_sequences: Sequence[str] = ()) -> None:
        self.stopped = False  # a stop sequence has appeared: the text is complete
        self._stop_sequences = tuple(stop_sequences)
        self._characters = _Characters(tokenizer)
        self._held = ""  # not shown: it may be the beginning of a stop sequence
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
        # A stop sequence is in the text, but another that began before it may still complete: then that one is first.
        self.stopped = found < len(held) and found <= ready
        if self.stopped:
            self._held = ""
            return held[:found]
        self._held = held[ready:]
        return held[:ready]

    def _unfinished(self, held: str) -> int:
        """Where the longest end of `held` begins that a stop sequence begins with."""
        longest = max(map(len, self._stop_sequences), default=0)
        for at in range(max(0, len(held) - longest + 1), len(held)):
            end = held[at:]
            if any(stop.startswith(end) for stop in self._stop_sequences):
                return at
        return len(held)


class _Characters:
    """Token ids -> whole characters, in a time per token that does not grow: it decodes a window of the last tokens."""

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
        # One bad byte makes replacement characters of its whole run of byte tokens, so the run has to be over.
        if self._in_bytes:
            return ""
        text = self._decode(self._window)
        # The bytes of a character that is not complete come out as one replacement character, the last.
        ready = len(text) - text.endswith("\ufffd")
        fresh = text[self._read : ready]
        self._read = ready
        self._move_on(text)
        return fresh

    def end(self) -> str:
        """Return what is left, without the beginning of a character that the answer's last token cut."""
        text = self._decode(self._window)
        if self._in_bytes:
            # a character has four bytes at most, and half of one spoils the whole run
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
