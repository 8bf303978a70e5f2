"""What one pass of a model tells its layers beside their arguments: one object, set by one context manager."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Pass:
    """What a pass writes and reads, the same in every layer.

    A decode pass writes one token in each of the first rows of the cache, at that row's own position, and reads their
    first `length` positions. A prefill pass writes positions `start` to `length` of some rows and reads all before.
    """

    length: int
    start: int
    positions: Tensor | None = None
    """(rows,) int64, of a decode pass: where each row's token is written."""
    rows: Tensor | slice | None = None
    """Of a prefill pass: which rows of the cache are written, (rows,) int64, or a slice where they lie side by side,
    which no layer then has to gather."""
    tokens: int = 0
    """Of a prefill pass, padding included."""
    prompt_tokens: Tensor | None = None
    """(prompt tokens,) int64, indices into `tokens` of those that are not padding; None: all are."""
    tile: int | None = None
    """The CPU's own attention pads the queries that it computes together to a multiple of this; None: it is torch's."""
    additive_masks: dict[tuple[int, ...], tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Of that attention, what it made of boolean masks: all layers get the same."""


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
