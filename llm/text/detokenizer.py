"""Token ids -> text as it grows. Knows nothing of prompts, sampling or the model."""

import re
from collections.abc import Sequence
from copy import copy
from functools import lru_cache
from itertools import islice

from transformers import PreTrainedTokenizerFast

from llm.errors import UserError

# Tokens that the window keeps when it moves on. The first few may decode differently without those before them: half a
# character is cut off, or a leading blank goes. With this many, the last ones decode as they did.
CONTEXT = 24

# SentencePiece spells what its vocabulary lacks in bytes: <0xF0>, <0x9F>, ...
BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")

MOST_STOP_SEQUENCES = 32

ESCAPES = {"n": "\n", "t": "\t", "\\": "\\", ",": ","}

# No text has half a surrogate pair, so each can stand for a control token.
MARKS = re.compile("[\ud800-\udfff]")


def split_stop_sequences(value: str | None) -> tuple[str, ...]:
    """The stop sequences that a user wrote with commas between; blanks are part of them, empty ones are dropped.

    \\n, \\t, \\\\ and \\, stand for a line break, a tab, a backslash and a comma; before anything else a backslash is
    itself. Raises UserError where there are more than MOST_STOP_SEQUENCES.
    """
    written = re.findall(r"(?:\\.|[^,])+", value or "", re.DOTALL)
    if len(written) > MOST_STOP_SEQUENCES:
        raise UserError(f"stop_sequences lleva {len(written)} textos y se admiten {MOST_STOP_SEQUENCES}: quite algunos")
    return tuple(re.sub(r"\\([nt\\,])", lambda escape: ESCAPES[escape[1]], text) for text in written)


class Text:
    """The text of one answer: no special tokens, no half characters, nothing from a stop sequence on.

    Joined, what `add` and `end` return is the decoding of all tokens at once, without its leading blanks and without an
    incomplete last character, up to where the first stop sequence begins. How the tokens were spread over the calls
    makes no difference. A stop sequence may name special tokens: it is looked for in the text as it would be with them.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        stop_sequences: Sequence[str] = (),
        prompt: Sequence[int] = (),
    ) -> None:
        """prompt: the ids that the text continues. Its leading blanks are then part of it."""
        self.stopped = False  # a stop sequence has appeared: the text is complete
        self.unused = 0  # tokens of the call that stopped it which come after the one that did
        special = _special_tokens(tokenizer)
        named = sorted((name for name in special if any(name in stop for stop in stop_sequences)), key=len)
        marks = {name: chr(0xD800 + i) for i, name in enumerate(reversed(named))}
        self._stop_sequences = {*stop_sequences, *(_marked(stop, marks) for stop in stop_sequences)}
        self._beginnings = {stop[:end] for stop in self._stop_sequences for end in range(1, len(stop))}
        self._longest = max(map(len, self._stop_sequences), default=0)
        self._characters = _Characters(tokenizer, special, marks, prompt)
        self._held = ""  # not shown yet: it may be the beginning of a stop sequence
        self._begun = bool(prompt)

    def add(self, tokens: Sequence[int]) -> str:
        """Take the next tokens; return the text that may be shown now, "" while it is held back or after the end."""
        if self.stopped:
            return ""
        before = copy(self)
        before._characters = copy(self._characters)
        shown = self._add(tokens)
        if self.stopped:
            self.unused = len(tokens) - before._needed(tokens)
        return shown

    def end(self) -> str:
        """Return all that is still held back: no more tokens come."""
        return "" if self.stopped else self._show(self._characters.end(), last=True)

    def _add(self, tokens: Sequence[int]) -> str:
        return self._show(self._characters.add(tokens), last=False)

    def _needed(self, tokens: Sequence[int]) -> int:
        """How many of the next tokens there are up to the one that stops the text."""
        for needed, token in enumerate(tokens, 1):
            self._add([token])
            if self.stopped:
                return needed
        return len(tokens)

    def _show(self, text: str, last: bool) -> str:
        held = self._held + text
        if not self._begun:
            held = held.lstrip()
        ready = len(held) if last else self._unfinished(held)
        first = min((at for stop in self._stop_sequences if (at := held.find(stop)) >= 0), default=len(held))
        # another stop sequence that began before this one may still be completed by what comes
        self.stopped = first < len(held) and first <= ready
        end = first if self.stopped else ready
        self._held = held[end:]
        shown = MARKS.sub("", held[:end])
        if not self._begun:
            shown = shown.lstrip()
            self._begun = bool(shown)
        return shown

    def _unfinished(self, held: str) -> int:
        """Where the longest suffix of `held` that could begin a stop sequence starts."""
        suffixes = range(max(0, len(held) - self._longest + 1), len(held))
        return next((at for at in suffixes if held[at:] in self._beginnings), len(held))


def _marked(stop: str, marks: dict[str, str]) -> str:
    """The stop sequence with a mark for each special token in it. marks: the longest names first."""
    for name, mark in marks.items():
        stop = stop.replace(name, mark)
    return stop


class _Characters:
    """Token ids -> whole characters. It decodes a window of the last tokens, so a token's cost does not grow."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        special: frozenset[str],
        marks: dict[str, str],
        prompt: Sequence[int],
    ) -> None:
        """special: the names of tokens that are not text; marks: what stands for some of them all the same."""
        self._backend = tokenizer.backend_tokenizer
        self._special = special
        self._marks = marks
        # Many tokenizers drop the first blank of what they decode: behind a token of the prompt it is not the first.
        # That token is no byte, for the bytes of the text would be read together with it.
        before = (id for id in reversed(prompt) if (name := self._text(id)) and not BYTE_TOKEN.fullmatch(name))
        self._window = list(islice(before, 1))
        self._read = len(self._decode(self._window))  # characters of the window's text that were returned
        self._in_bytes = False

    def add(self, tokens: Sequence[int]) -> str:
        text = ""
        for token in tokens:
            name = self._backend.id_to_token(token)
            if mark := self._marks.get(name or ""):
                text += self.end() + mark
            elif name and name not in self._special:
                in_bytes = BYTE_TOKEN.fullmatch(name) is not None
                if in_bytes:
                    # what came before the run waits for nothing
                    text += self._whole()
                # not in place: `Text` goes back to the window before
                self._window = [*self._window, token]
                self._in_bytes = in_bytes
        return text + self._whole()

    def end(self) -> str:
        """Return what is left, without an incomplete last character."""
        text = self._decode(self._window)
        if self._in_bytes:
            # a character has up to four bytes, and an incomplete one spoils the whole run
            ends = (self._decode(self._window[: len(self._window) - cut]) for cut in range(4))
            text = next((whole for whole in ends if not whole.endswith("\ufffd")), text)
        return self._take(text, len(text.removesuffix("\ufffd")))

    def _whole(self) -> str:
        """The characters that no further token changes."""
        # one bad byte turns its whole run of byte tokens into replacement characters: wait until the run is over
        if self._in_bytes:
            return ""
        text = self._decode(self._window)
        # an incomplete character decodes as one replacement character at the end
        fresh = self._take(text, len(text) - text.endswith("\ufffd"))
        self._move_on(text)
        return fresh

    def _take(self, text: str, end: int) -> str:
        """The window's text from where it was last taken to `end`."""
        fresh = text[self._read : end]
        self._read = max(self._read, end)
        return fresh

    def _text(self, token: int) -> str | None:
        """The token as the vocabulary spells it, None where it is no text."""
        name: str | None = self._backend.id_to_token(token)
        return None if name in self._special else name

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
