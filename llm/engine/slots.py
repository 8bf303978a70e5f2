"""The key/value cache: one row for each running request. Knows rows and positions, nothing of requests."""

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from llm.devices import forward
from llm.devices.attention import LENGTH_STEP, in_steps
from llm.engine.prefixes import BLOCK, Prefixes

KeyValues = tuple[Tensor, ...]
"""Some tokens' keys and values: for each shape that layers have, (tensors, heads, tokens, head size)."""
SMALLEST = (1, LENGTH_STEP)
"""Rows and positions that are allocated on a CPU while nobody asks."""


def _current_pass() -> forward.Pass:
    pass_ = forward.current()
    assert pass_ is not None
    return pass_


class SlotLayer(CacheLayerMixin):
    """The keys and values of one layer, (rows, heads, capacity, head size) each, on that layer's own device."""

    is_compileable = True  # masks of a decode pass have a fixed shape, and making them reads nothing back
    is_sliding = False

    keys: Tensor
    values: Tensor

    def __init__(self, slots: "Slots"):
        super().__init__()
        self.slots = slots

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # zeros: a masked position is multiplied by 0, which memory never written could turn into NaN
        rows, length = self.slots.capacity
        self.keys = key_states.new_zeros(rows, key_states.shape[1], length, key_states.shape[3])
        self.values = value_states.new_zeros(rows, value_states.shape[1], length, value_states.shape[3])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write this pass's keys and values, (rows, heads, tokens, head size), and return all that it reads."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        pass_ = _current_pass()
        if pass_.ragged:
            pass_.ragged.write(key_states, value_states, self.keys, self.values)
            return self.keys, self.values
        device, length = key_states.device, pass_.length
        rows = pass_.rows if isinstance(pass_.rows, slice) else pass_.rows.to(device)
        if pass_.positions is not None:
            self._write(self.keys, key_states, pass_)
            self._write(self.values, value_states, pass_)
        else:
            self.keys[rows, :, pass_.start : length] = key_states
            self.values[rows, :, pass_.start : length] = value_states
            if pass_.start == 0:
                return key_states, value_states
        return self.keys[rows, :, :length], self.values[rows, :, :length]

    def _write(self, cached: Tensor, states: Tensor, pass_: forward.Pass) -> None:
        """Write each row's tokens at positions of its own. cached (rows, heads, capacity, head size)."""
        assert pass_.positions is not None
        _, heads, capacity, size = cached.shape
        key = "places", heads, capacity, cached.device
        if key not in pass_.memo:
            rows = self.slots.row_numbers[pass_.rows]
            first = (rows[:, None] * heads + torch.arange(heads, device=rows.device)) * capacity
            pass_.memo[key] = (first[:, :, None] + pass_.positions[:, None]).flatten().to(cached.device)
        written = states[: len(pass_.positions)].reshape(-1, size)
        cached.view(-1, size).index_copy_(0, pass_.memo[key], written)

    def resize(self, rows: int, length: int) -> None:
        """Allocate `rows` rows of `length` positions, and copy what fits of the old ones."""
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(rows, old.shape[1], length, old.shape[3])
            both = (slice(min(rows, old.shape[0])), slice(None), slice(min(length, old.shape[2])))
            new[both] = old[both]
            setattr(self, name, new)

    def get_seq_length(self) -> int:
        return _current_pass().start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return _current_pass().length, 0

    def get_max_length(self) -> int:
        return self.slots.context


class Slots(Cache):
    """`rows` contexts of `context` tokens each, as transformers' Cache: any causal model writes to it.

    With `grows`, for a CPU, only the rows in use are allocated, each as long as the longest of them: a CPU's matrix
    products are fast where what they read is contiguous. They grow in steps of LENGTH_STEP; each time all are copied,
    which takes as long as a step or two. Without, for CUDA graphs, nothing is ever moved.

    Prefixes take the memory that `rows` whole contexts would take and the allocated ones do not, and `spare` tokens.
    """

    def __init__(
        self,
        layers: int,
        rows: int,
        context: int,
        device: torch.device,
        grows: bool,
        prefixes: Prefixes[KeyValues],
        spare: int = 0,
    ):
        self.slot_layers = [SlotLayer(self) for _ in range(layers)]
        super().__init__(layers=[*self.slot_layers])
        self.rows = rows
        self.context = context
        self.grows = grows
        self.capacity = SMALLEST if grows else (rows, context)
        """Rows and positions that are allocated."""
        self.row_numbers = torch.arange(rows, device=device)
        self.prefixes = prefixes
        self.spare = spare
        self._limit_prefixes(*self.capacity)

    def ensure_capacity(self, rows: int, length: int, soon: int = 0) -> int:
        """Allocate `length` positions in each of the first `rows` rows. Returns how many a decode step reads.

        soon: positions that are not given back, for they will be needed next."""
        if not self.grows:
            return min(self.context, max(256, 1 << (length - 1).bit_length()))
        rows = min(self.rows, 1 << (rows - 1).bit_length())
        length, soon = (min(self.context, in_steps(positions)) for positions in (length, soon))
        if rows > self.capacity[0] or length > self.capacity[1] or max(length, soon) <= self.capacity[1] // 2:
            self._resize(rows, max(length, min(soon, self.capacity[1])))
        return self.capacity[1]

    def shrink(self) -> None:
        """Give back what `ensure_capacity` allocated."""
        if self.grows:
            self._resize(*SMALLEST)

    def _resize(self, rows: int, length: int) -> None:
        self._limit_prefixes(rows, length)
        # without memory for all layers, some have the new size and some the old one: what they all have counts
        self.capacity = (min(rows, self.capacity[0]), min(length, self.capacity[1]))
        for layer in self.slot_layers:
            if layer.is_initialized:
                layer.resize(rows, length)
        self.capacity = (rows, length)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of a row over another's."""
        for tensor in self._tensors():
            tensor[target, :, :length] = tensor[source, :, :length]

    def clear(self, row: int) -> None:
        """Write zeros over a row that holds NaN: a masked position is multiplied by 0, and NaN would stay NaN."""
        for tensor in self._tensors():
            tensor[row : row + 1].fill_(0)

    def load(self, row: int, blocks: list[KeyValues]) -> None:
        """Write prefixes' blocks into the first positions of a row."""
        start, alike = 0, self._alike()
        for block in blocks:
            for tensors, parts in zip(alike, block, strict=True):
                end = start + parts.shape[-2]
                for tensor, part in zip(tensors, parts.unbind(), strict=True):
                    tensor[row, :, start:end] = part
            start = end

    def block(self, row: int, start: int, end: int) -> KeyValues:
        """Copy the positions from `start` to `end` of a row."""
        return tuple(torch.stack([tensor[row, :, start:end] for tensor in tensors]) for tensors in self._alike())

    def _alike(self) -> list[list[Tensor]]:
        """All layers' keys and values, by shape and device."""
        alike: dict[tuple[object, ...], list[Tensor]] = {}
        for tensor in self._tensors():
            alike.setdefault((tensor.device, tensor.dtype, *tensor.shape), []).append(tensor)
        return [*alike.values()]

    def _tensors(self) -> Iterator[Tensor]:
        for layer in self.slot_layers:
            yield from (layer.keys, layer.values)

    def _limit_prefixes(self, rows: int, length: int) -> None:
        """Where so many rows and positions are allocated."""
        self.prefixes.limit((self.rows * self.context - rows * length + self.spare) // BLOCK)
