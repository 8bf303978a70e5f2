"""Tokens that were read once are not read again: the keys and values of beginnings of prompts, in blocks.

Pure Python: what a block holds is the caller's. Ids are compared as bytes, those of `as_bytes`.
"""

from array import array
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

BLOCK = 64
"""Tokens of a block. The time to the first token tells a caller whether a prefix was read before, so somebody else's
question could be guessed token by token if blocks were short."""

Block = TypeVar("Block")

_ID_BYTES = array("I").itemsize


def as_bytes(ids: list[int]) -> bytes:
    """Four bytes for each id."""
    return array("I", ids).tobytes()


def beginning(ids: bytes, tokens: int) -> bytes:
    """The ids of the first tokens."""
    return ids[: tokens * _ID_BYTES]


def count(ids: bytes) -> int:
    """How many tokens these are."""
    return len(ids) // _ID_BYTES


class Prefixes(Generic[Block]):
    """Blocks by all ids from the beginning of a prompt to the block's end, the least recently used first.

    A use moves a prompt's blocks to the end, its first block last. So a block goes before those that it follows, and
    of each prompt the first blocks are held, without a gap. The template's prefix, of any length, never goes.
    """

    def __init__(self, shares: bool = True):
        """shares: whether requests share more than the template's prefix."""
        self.most = 0
        """How many blocks there is memory for: see `limit`."""
        self._shares = shares
        self._blocks: OrderedDict[bytes, Block] = OrderedDict()
        self._template: tuple[bytes, list[Block]] = b"", []

    def __len__(self) -> int:
        return len(self._blocks)

    def cached(self, prompt: bytes) -> int:
        """How many of a prompt's first tokens need not be read. Never all: the last one's logits are wanted."""
        return max(self._held(prompt, count(prompt) - 1), self._of_template(prompt))

    def use(self, prompt: bytes) -> tuple[int, list[Block]]:
        """As many tokens, and the blocks that hold them, now the most recently used."""
        held = self._held(prompt, count(prompt) - 1)
        if (template := self._of_template(prompt)) > held:
            return template, self._template[1]
        return held, self._touch(prompt, held)

    def add(self, ids: bytes, copy: Callable[[int, int], Block]) -> None:
        """Hold the whole blocks of these tokens, as far as there is memory. copy: makes the block from a token to
        another."""
        held = self._held(ids, count(ids))
        self._touch(ids, held)
        end = min(count(ids) // BLOCK, self.most) * BLOCK
        if held < end:
            self._evict(self.most - (end - held) // BLOCK)
            starts = range(held, end, BLOCK)
            # all or none: a copy for which there is no memory leaves no gap
            copies = [copy(start, start + BLOCK) for start in starts]
            self._blocks |= {beginning(ids, start + BLOCK): block for start, block in zip(starts, copies, strict=True)}
            self._touch(ids, end)

    def add_template(self, ids: bytes, block: Block) -> None:
        """Hold for good what most prompts begin with, as one block of any length."""
        self._template = ids, [block]

    def limit(self, most: int) -> None:
        """Hold at most so many blocks."""
        self.most = most if self._shares else 0
        self._evict(self.most)

    def forget(self, ids: bytes) -> None:
        """Drop all that begins as these tokens do."""
        begins = beginning(ids, BLOCK)
        for key in [key for key in self._blocks if key.startswith(begins)]:
            del self._blocks[key]

    def clear(self) -> None:
        """Drop all but the template's prefix."""
        self._blocks.clear()

    def _evict(self, most: int) -> None:
        while len(self._blocks) > most:
            self._blocks.popitem(last=False)

    def _held(self, ids: bytes, tokens: int) -> int:
        """How many of the first `tokens` are in blocks."""
        ends = range(BLOCK, tokens + 1, BLOCK)
        return BLOCK * bisect_left(ends, True, key=lambda end: beginning(ids, end) not in self._blocks)

    def _of_template(self, prompt: bytes) -> int:
        ids, _ = self._template
        return count(ids) if len(ids) < len(prompt) and prompt.startswith(ids) else 0

    def _touch(self, ids: bytes, tokens: int) -> list[Block]:
        keys = [beginning(ids, end) for end in range(BLOCK, tokens + 1, BLOCK)]
        for key in reversed(keys):
            self._blocks.move_to_end(key)
        return [self._blocks[key] for key in keys]
