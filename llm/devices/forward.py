"""What one pass of a model tells its layers beside their arguments: one object, set by one context manager."""

import threading
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor, nn


class Ragged(Protocol):
    """The tokens of a ragged pass, each with a row of the cache and a position of its own: see kernels.py."""

    block: int
    """So many tokens in line are of one row: 1 in a decode pass, more in a prefill pass."""

    def write(self, keys: Tensor, values: Tensor, cached_keys: Tensor, cached_values: Tensor) -> None:
        """Write each token's key and value to the cache of a layer."""

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        """Attention of each token to the keys of its row, up to its position."""


@dataclass
class Pass:
    """What a pass writes and reads, the same in every layer.

    A decode pass writes one token in each of the first rows of the cache; a prefill pass writes a rectangle of tokens,
    padding included. Both read the first `length` positions of the rows that they write.
    """

    length: int
    start: int
    """The first position of the pass, of the row that starts last. A model's mask is made for that row."""
    rows: Tensor | slice
    """Which rows of the cache are written, (rows,) int64, or a slice where they lie side by side, which no layer then
    has to gather."""
    positions: Tensor | None = None
    """(rows, tokens) int64, where rows write at positions of their own; None: all write from `start` to `length`."""
    starts: Sequence[int] = ()
    """Of a prefill pass: each row's first position."""
    counts: Sequence[int] = ()
    """Of a prefill pass: each row's tokens without padding."""
    tokens: int = 0
    """Of a prefill pass, padding included."""
    padding: int = 0
    """Of a decode pass: rows that layers compute and nobody reads, after the others. With them all products have the
    number of rows that makes them batch-invariant, and no layer has to pad its own."""
    shared: int = 0
    """Of a prefill pass: at so many first positions all of its rows hold the same keys and values."""
    prompt_tokens: Tensor | None = None
    """(prompt tokens,) int64, indices into `tokens` of those that are not padding; None: all are."""
    tile: int | None = None
    """The CPU's own attention pads the queries that it computes together to a multiple of this; None: it is torch's."""
    ragged: Ragged | None = None
    """On a GPU with kernels for it, the pass is no rectangle but a list of tokens: the second dimension of what layers
    compute, the first is 1. For the model, which makes its mask for them, they follow on a whole context, so that
    the mask hides no key. Nothing else here than `start` and `length` counts then."""
    memo: dict[tuple[Hashable, ...], Any] = field(default_factory=dict)
    """What its first layer computed for all that are like it."""
    product: tuple[nn.Module, Tensor, Tensor] | None = None
    """The last joined layer that computed, its inputs and its product, for the other layers that it stands for."""

    def with_padding(self, x: Tensor) -> Tensor:
        """x (rows, ...) with the rows of the padding, zeros, after its own."""
        return F.pad(x, (0, 0) * (x.dim() - 1) + (0, self.padding)) if self.padding else x


class _Current(threading.local):
    value: Pass | None = None


_current = _Current()


def current() -> Pass | None:
    """The pass that this thread is in."""
    return _current.value


@contextmanager
def run(pass_: Pass) -> Iterator[None]:
    """Within it the layers that this thread calls see the pass."""
    _current.value = pass_
    try:
        yield
    finally:
        _current.value = None
