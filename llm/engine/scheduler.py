"""Which sequences have a row, and what the next pass reads. Pure Python: numbers of tokens, no tensors, no threads."""

import time
from collections import deque
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from llm.engine.prefixes import BLOCK, Prefixes, beginning
from llm.engine.sequence import Sequence, Status

MOST_ROWS = 32
"""Sequences that run at once where the memory holds them. predict.py says so to Cog, which reads it there as text."""
SMALLEST_PART = 16
"""Where passes lack memory, the chunk of prompts that a pass reads shrinks, down to this part of its size."""
PASSES_TO_GROW = 8
"""After so many passes with memory, a chunk that shrank doubles."""


@dataclass(frozen=True)
class Chunk:
    """Tokens of one prompt, for one pass."""

    sequence: Sequence
    start: int
    """Its first token's position."""
    count: int

    @property
    def is_last(self) -> bool:
        return self.start + self.count == self.sequence.prefill_end


class PassShape(Protocol):
    """How a pass lays out chunks."""

    @property
    def multiple(self) -> int:
        """A chunk that ends at a multiple of this needs no padding."""

    @property
    def mixes_starts(self) -> bool:
        """The chunks of a pass may start at different positions."""

    @property
    def left_to_decode(self) -> int:
        """So many tokens at the end of a prompt are left to its first decode step."""

    def longest(self, chunks: list[Chunk], sequence: Sequence, most: int) -> int:
        """The tokens that the next chunk of a sequence may have beside these ones, in a pass of `most` tokens."""

    def fits(self, chunks: list[Chunk], most: int) -> bool:
        """Whether one pass can read these chunks, and computes `most` tokens at the most."""


@dataclass(frozen=True)
class Rectangle:
    """A row for each chunk, shorter chunks padded."""

    context: int
    multiple: int
    """The rectangle ends at a position that is a multiple of this, or at the context's end."""
    skips_padding: bool
    """The layers compute the chunks' tokens alone."""
    mixes_starts: bool = False
    left_to_decode: ClassVar = 0

    def longest(self, chunks: list[Chunk], sequence: Sequence, most: int) -> int:
        end = (sequence.cached + most) // self.multiple * self.multiple
        return end - sequence.cached

    def end(self, chunks: list[Chunk]) -> int:
        """The position where the pass ends, in the row that starts last."""
        # two tokens at least: one of each row is what a decode step computes, in other numbers of rows
        end = self._start(chunks) + max(2, *(chunk.count for chunk in chunks))
        return min(self.context, -(-end // self.multiple) * self.multiple)

    def width(self, chunks: list[Chunk]) -> int:
        """The tokens of each row, padding included."""
        return self.end(chunks) - self._start(chunks)

    def tokens(self, chunks: list[Chunk]) -> int:
        """How many tokens the pass computes."""
        if self.skips_padding:
            return sum(chunk.count for chunk in chunks)
        return len(chunks) * self.width(chunks)

    def fits(self, chunks: list[Chunk], most: int) -> bool:
        if not self.mixes_starts and len({chunk.start for chunk in chunks}) > 1:
            return False
        return self.width(chunks) >= max(chunk.count for chunk in chunks) and self.tokens(chunks) <= most

    @staticmethod
    def _start(chunks: list[Chunk]) -> int:
        return max(chunk.start for chunk in chunks)


@dataclass(frozen=True)
class Ragged:
    """One list of tokens, wherever their chunks start, each chunk padded to whole blocks.

    The last token of a prompt is left to a decode step, which has graphs to choose what follows.
    """

    multiple: int
    """Tokens of a block."""
    mixes_starts: ClassVar = True
    left_to_decode: ClassVar = 1

    def longest(self, chunks: list[Chunk], sequence: Sequence, most: int) -> int:
        return (most - self.tokens(chunks)) // self.multiple * self.multiple

    def fits(self, chunks: list[Chunk], most: int) -> bool:
        return all(chunk.count > 0 for chunk in chunks) and self.tokens(chunks) <= most

    def tokens(self, chunks: list[Chunk]) -> int:
        """How many tokens the pass computes."""
        return sum(-(-chunk.count // self.multiple) * self.multiple for chunk in chunks)


class Scheduler:
    """Sequences by status: `waiting`; `running`, those with a row, the one that is served next first; `finishing`.

    Every sequence that is not FINISHED is in one of the three, so whoever ends them all forgets none.
    """

    def __init__(self, rows: int, chunk: int, shape: PassShape, prefixes: Prefixes[Any]):
        """rows: the most sequences that run at once; chunk: the most tokens that a pass of prompts computes; prefixes:
        what was read already."""
        self.rows = rows
        self.chunk = chunk
        self.shape = shape
        self.prefixes = prefixes
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.finishing: list[Sequence] = []
        self._largest_chunk = chunk
        # two multiples: wherever a chunk starts, there is an end for it that needs no padding
        self._smallest_chunk = min(chunk, max(2 * shape.multiple, chunk // SMALLEST_PART))
        self._passes_with_memory = 0
        self._waits_for_a_row = False

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running or self.finishing)

    @property
    def rows_soon(self) -> int:
        """How many rows the sequences that run and those that wait will take."""
        return min(self.rows, len(self.running) + len(self.waiting))

    @property
    def unfinished(self) -> list[Sequence]:
        """Those with a row, or with ids on their way."""
        return self.running + self.finishing

    @property
    def decoding(self) -> list[Sequence]:
        return [sequence for sequence in self.running if sequence.status is Status.DECODING]

    @property
    def cancelled(self) -> list[Sequence]:
        return [sequence for sequence in self.unfinished if sequence.cancelled]

    def admit(self) -> Sequence | None:
        """The sequence that gets a free row now, the longest waiting first, if there are both.

        A sequence that could go on from what another one is reading waits until that is read.
        """
        while len(self.running) < self.rows and not self._waits_for_a_row:
            ready = (s for s in tuple(self.waiting) if s.cancelled or not self._is_being_read(s))
            if not (sequence := next(ready, None)):
                break
            self.waiting.remove(sequence)
            if sequence.cancelled:
                sequence.status = Status.FINISHED
                continue
            sequence.admitted = time.perf_counter()
            sequence.status = Status.PREFILLING
            self.running.append(sequence)
            return sequence
        return None

    def _is_being_read(self, sequence: Sequence) -> bool:
        """Whether a prompt is being read that has the next block which this one could use."""
        blocks = 1 + self.prefixes.cached(sequence.ids) // BLOCK
        end = blocks * BLOCK
        if blocks > self.prefixes.most or end >= len(sequence.prompt):
            return False
        wanted = beginning(sequence.ids, end)
        return any(
            other.status is Status.PREFILLING and other.cached < end and other.ids.startswith(wanted)
            for other in self.running
        )

    def next_pass(self) -> list[Chunk]:
        """The next chunk of the first prompt in line, and those of the prompts that fit into the same pass."""
        prefilling = [sequence for sequence in self.running if sequence.status is Status.PREFILLING]
        chunks: list[Chunk] = []
        for sequence in prefilling:
            first = prefilling[0]
            longest = self.shape.longest(chunks, sequence, self.chunk)
            chunk = Chunk(sequence, sequence.cached, min(sequence.prefill_end - sequence.cached, longest))
            beside = not (sequence.alone or first.alone) and self.shape.fits([*chunks, chunk], self.chunk)
            if sequence is first or beside:
                chunks.append(chunk)
        return chunks

    def placed(self, sequence: Sequence) -> None:
        """Note that a sequence has its row, and in it what the cache already holds of its prompt."""
        if sequence.prefilled:
            sequence.status = Status.DECODING

    def prefilled(self, chunks: list[Chunk]) -> None:
        """Note that a pass has read these."""
        for chunk in chunks:
            if chunk.is_last:
                chunk.sequence.status = Status.DECODING
            else:
                # last in line: a long prompt does not delay the short ones that have arrived meanwhile
                self.running.remove(chunk.sequence)
                self.running.append(chunk.sequence)
        self._passes_with_memory += 1
        if self._passes_with_memory >= PASSES_TO_GROW:
            self._passes_with_memory = 0
            self.chunk = min(self._largest_chunk, 2 * self.chunk)

    def schedule(self, sequence: Sequence) -> None:
        """Note that one more token of this sequence is on its way. After the last one the sequence is FINISHING."""
        sequence.scheduled += 1
        if sequence.scheduled == sequence.budget:
            self._leave(sequence)
            sequence.status = Status.FINISHING
            self.finishing.append(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Note that the client has been sent the end."""
        self._leave(sequence)
        sequence.status = Status.FINISHED

    def read_less(self, chunks: list[Chunk]) -> bool:
        """After a pass that lacked memory: read its prompts one by one, in smaller chunks.

        Returns whether that is possible: False for one prompt in the smallest chunk.
        """
        possible = len(chunks) > 1 or self.chunk > self._smallest_chunk
        self.chunk = max(self._smallest_chunk, self.chunk // 4)
        self._passes_with_memory = 0
        for chunk in chunks:
            chunk.sequence.alone = True
        return possible

    def wait_for_a_row(self, sequence: Sequence) -> bool:
        """Queue a sequence again, first, until another one gives its row back. False where no other has one."""
        if len(self.running) < 2:
            return False
        self._leave(sequence)
        sequence.status = Status.WAITING
        sequence.cached = 0
        self.waiting.appendleft(sequence)
        self._waits_for_a_row = True
        return True

    def _leave(self, sequence: Sequence) -> None:
        for place in (self.running, self.finishing):
            if sequence in place:
                place.remove(sequence)
        self._waits_for_a_row = False
