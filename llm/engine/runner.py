"""The tensors of a step: prefill and decode on transformers' own forward pass, and CUDA graphs of the latter.

Knows rows, not requests; gives back ids, not text. One thread calls it, with inference mode on. On a GPU nothing here
makes that thread wait for the device but `PendingIds.read` and `synchronize`: numbers are written by fills, lists by
non-blocking copies from pinned memory, and all of it stays in the order of one stream.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from llm.devices import cpu
from llm.devices.gpu import Capture, Replay
from llm.devices.model import Model
from llm.devices.threads import Threads
from llm.engine.sampling import Sampling, SamplingRows, sample_each, sampling_width
from llm.engine.slots import Slots, Window

MULTIPLE = 8
"""A GPU's attention pads the length that it reads to a multiple of this, once in every layer unless it is one."""


class PendingIds:
    """The ids that a step chose, on their way to the host."""

    def __init__(self, ids: Tensor):
        self.ready: torch.cuda.Event | None = None
        self.host = torch.empty(ids.shape, dtype=ids.dtype, pin_memory=ids.is_cuda)
        self.host.copy_(ids, non_blocking=True)
        if ids.is_cuda:
            self.ready = torch.cuda.Event()
            self.ready.record()

    def read(self) -> list[int]:
        """Wait for them. Returns an id for each row of the step, NOT_A_NUMBER where its logits are none."""
        if self.ready:
            self.ready.synchronize()
        return self.host.tolist()


@dataclass(eq=False)
class Row:
    """A place in the cache, from `Runner.put` until `Runner.release`, and what the host knows of it."""

    number: int
    """Where it is now: a decode step may move it."""
    prompt: int
    """Tokens of its prompt."""
    sampling: Sampling
    cached: int = 0
    """Tokens whose keys and values are in the cache, or will be after the steps on their way."""

    @property
    def prefilled(self) -> bool:
        """Its whole prompt is in the cache: decode steps take it further."""
        return self.cached >= self.prompt


class Runner:
    """Reads prompts into rows, and takes the rows a token further.

    What a row holds on the device: `history`, its ids so far, padded with the first; `positions`, where its last id
    stands, whose key and value are not yet in the cache; its sampling; and `active`, whether it is prefilled.

    What the layers read during a pass beside their arguments, `slots.window` and the model's `padding`, is set in
    `_logits` and nowhere else.
    """

    def __init__(self, model: Model, rows: int, capture: Capture | None = None):
        device = model.device
        self.model = model
        self.rows: dict[int, Row] = {}
        self.prefix: list[int] = []
        """What `save_prefix` was given."""
        self.slots = Slots(model.layers, rows, model.context, device, grows=device.type == "cpu")
        self.history = torch.zeros(rows, model.context, dtype=torch.long, device=device)
        self.positions = torch.zeros(rows, dtype=torch.long, device=device)
        self.active = torch.zeros(rows, dtype=torch.bool, device=device)
        self.sampling = SamplingRows.empty(rows, device)
        self.logits = torch.zeros(rows, model.vocabulary, device=device)
        self.chosen = torch.zeros(rows, dtype=torch.long, device=device)
        self.columns = torch.arange(model.context, device=device)
        self.takes_positions = "position_ids" in inspect.signature(model.network.forward).parameters
        self.threads = Threads(model.keeps_bits) if device.type == "cpu" else None
        self.capture = capture
        self.multiple = MULTIPLE if capture or device.type != "cpu" else 1
        self.forward_graphs: dict[tuple[int, int], Replay] = {}
        """By rows and length."""
        self.choose_graphs: dict[tuple[int, int], Replay] = {}
        """By rows and width."""

    def save_prefix(self, prefix: list[int], chunk: int) -> None:
        """Prefill a prefix once, in chunks: prompts that begin with it are then prefilled from there on."""
        row = self.put(prefix, Sampling())
        while left := len(prefix) - row.cached:
            self.prefill({row: min(left, chunk)}).read()
        self.slots.save_prefix(row.number, len(prefix))
        self.release(row)
        self.prefix = prefix

    def put(self, prompt: list[int], sampling: Sampling) -> Row:
        """Give a free row to a request. What the cache already holds of its prompt is in `cached`; `prefill` reads the
        rest."""
        saved = len(self.prefix)
        if saved == len(prompt) or prompt[:saved] != self.prefix:
            saved = 0
        number = next(number for number in range(self.slots.rows) if number not in self.rows)
        row = Row(number, len(prompt), sampling, cached=saved)
        if saved:
            self._ensure_capacity(saved, row)
            self.slots.load_prefix(number)
        self.positions[number : number + 1].fill_(saved)
        self.history[number : number + 1].fill_(prompt[0])
        self.history[number, : len(prompt)] = self._sent(prompt)
        self.sampling.put(number, sampling)
        self.rows[number] = row
        return row

    def release(self, row: Row) -> None:
        """Give a row back, once or again. A step may still compute it: what that writes is overwritten before it is
        read."""
        if self._is_in_use(row):
            self._deactivate(row.number)
            del self.rows[row.number]

    def clear(self, row: Row) -> None:
        """Make a place usable again whose keys or values may be NaN. Where it is another row's by now, that one meets
        them too, and is cleared then."""
        if self._is_in_use(row) or row.number not in self.rows:
            self.slots.clear(row.number)

    def _is_in_use(self, row: Row) -> bool:
        return self.rows.get(row.number) is row

    def _deactivate(self, number: int) -> None:
        self.active[number : number + 1].fill_(False)
        self.positions[number : number + 1].fill_(0)

    def _close_ranks(self) -> None:
        """Move the last rows into the holes that others left: a step computes all rows up to the last in use."""
        for hole in range(len(self.rows)):
            if hole not in self.rows:
                self._move(self.rows[max(self.rows)], hole)

    def _move(self, row: Row, target: int) -> None:
        source = row.number
        self.slots.move(source, target, row.cached)
        self.sampling.move(source, target)
        for tensor in (self.history, self.positions, self.active):
            tensor[target] = tensor[source]
        self._deactivate(source)
        # last, as all that the host knows: until then a device that fails leaves the row where it was
        self.rows[target] = self.rows.pop(source)
        row.number = target

    def tokens_computed(self, counts: dict[Row, int]) -> int:
        """How many tokens `prefill` would compute: with the padding of the shorter prompts where it is computed too."""
        if self.model.packed:
            return sum(counts.values())
        start = next(iter(counts)).cached
        return len(counts) * (self._end(counts) - start)

    def _end(self, counts: dict[Row, int]) -> int:
        """Up to where a pass of prompts computes."""
        # two tokens at least: one of each row is what a decode step computes, in other numbers of rows
        length = next(iter(counts)).cached + max(2, *counts.values())
        return min(self.slots.context, -(-length // self.multiple) * self.multiple)

    def prefill(self, counts: dict[Row, int]) -> PendingIds:
        """Read the next `counts[row]` tokens of the prompt of each of these rows, which all have as many cached.

        Returns an id for each row, in the order of `counts`: the first of its answer where its prompt has ended, else
        of no use.
        """
        # nothing that the host knows changes before the device has taken all of it: without memory it is asked again
        start = next(iter(counts)).cached
        length = self._end(counts)
        has_ended = [start + count == row.prompt for row, count in counts.items()]
        rows, ends, ended = self._sent(
            [[row.number for row in counts], list(counts.values()), list(map(int, has_ended))]
        )
        self._ensure_capacity(length)
        real = None
        if self.model.packed and min(counts.values()) < length - start:
            real = (self.columns[: length - start] < ends[:, None]).flatten().nonzero()[:, 0]
        logits = self._logits(
            self.history[rows, start:length],
            positions=self.columns[start:length].expand(len(counts), -1),
            window=Window(length, start, chosen=rows),
            keep=ends[:, None] - 1,
            real=real,
        )
        after = start + ends
        widths = self._widths([row.sampling for row in counts])
        ids = sample_each(logits, self.history[rows, :length], self.sampling[rows], after, widths)
        self.history[rows, after] = torch.where(ended > 0, ids.clamp(min=0), self.history[rows, after])
        self.positions[rows] = after
        self.active[rows] = ended > 0
        for row, count in counts.items():
            row.cached += count
        return PendingIds(ids)

    def decode(self) -> PendingIds:
        """Take every prefilled row one token further. Returns an id for each row by its number, of no use for one
        that is not prefilled."""
        self._close_ranks()
        running = [row for row in self.rows.values() if row.prefilled]
        for row in running:
            row.cached += 1
        rows = 1 + max(row.number for row in running)
        widths = self._widths([self.rows[number].sampling for number in range(rows)])
        if self.capture:
            rows = min(self.slots.rows, 1 << (rows - 1).bit_length())
        length = self._ensure_capacity(max(row.cached for row in running))
        self.forward_graphs.get((rows, length), partial(self._forward, rows, length))()
        self.choose_graphs.get((rows, widths[0]), partial(self._choose, rows, widths))()
        return PendingIds(self.chosen[:rows])

    def synchronize(self) -> None:
        """Wait for the device. Raises RuntimeError if it is lost."""
        if self.history.is_cuda:
            torch.cuda.synchronize()

    def fit_threads(self) -> None:
        """Between two steps, on a CPU: compute with as many threads as other programs leave cores for."""
        if self.threads:
            self.threads.fit()

    def rest(self) -> None:
        """While there are no rows: give the cache's memory back to the system."""
        if self.slots.shrink():
            cpu.trim()

    def empty_cache(self) -> None:
        """Return to the device the memory that torch keeps for later."""
        if self.history.is_cuda:
            torch.cuda.empty_cache()

    def _sent(self, numbers: Sequence[object]) -> Tensor:
        """Integers, or lists of them, as an int64 tensor on the device, without waiting for it."""
        host = torch.tensor(numbers, pin_memory=self.history.is_cuda)
        return host.to(self.history.device, non_blocking=True)

    def _ensure_capacity(self, length: int, *new: Row) -> int:
        """For `length` positions of each row in use, and of a new one. Returns how many a decode step reads."""
        rows = [*self.rows.values(), *new]
        # a decode step also writes to rows that are still being prefilled, at the position that they read next
        used = max(row.cached + (not row.prefilled) for row in rows)
        return self.slots.ensure_capacity(1 + max(row.number for row in rows), max(length, used))

    def _forward(self, rows: int, length: int) -> None:
        """Logits of the next id of each of the first `rows` rows, which read `length` positions."""
        positions = self.positions[:rows, None]
        self.logits[:rows] = self._logits(
            self.history[:rows].gather(1, positions),
            positions,
            window=Window(length, length - 1, positions=self.positions[:rows]),
            mask=self.columns[:length] <= positions,
        )

    def _choose(self, rows: int, widths: list[int]) -> None:
        """From those logits the next id, into the history of each active row."""
        history, active = self.history[:rows], self.active[:rows, None]
        after = self.positions[:rows, None] + active
        ids = sample_each(self.logits[:rows], history, self.sampling[:rows], after[:, 0], widths)
        self.chosen[:rows] = ids
        # NOT_A_NUMBER is for the host to see; the embedding needs an id
        history.scatter_(1, after, torch.where(active, ids[:, None].clamp(min=0), history.gather(1, after)))
        self.positions[:rows] = after[:, 0]

    def _logits(
        self,
        ids: Tensor,
        positions: Tensor,
        window: Window,
        mask: Tensor | None = None,
        keep: Tensor | None = None,
        real: Tensor | None = None,
    ) -> Tensor:
        """One pass. ids, positions (rows, tokens) int64; mask (rows, length) bool; keep (rows, 1) int64: the token
        whose logits are wanted; real: see Padding. Returns (rows, vocabulary) float32."""
        self.slots.window = window
        self.model.padding.tokens = 0 if keep is None else ids.numel()
        self.model.padding.real = real
        extra = {"position_ids": positions} if self.takes_positions else {}
        output = self.model.network(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=self.slots,
            use_cache=True,
            logits_to_keep=1 if keep is None else keep,
            **extra,
        )
        logits: Tensor = output.logits[:, -1, : self.model.vocabulary].float()
        # some models have logits for fewer ids than they read: the others are never chosen
        if missing := self.model.vocabulary - logits.shape[-1]:
            logits = torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)
        return logits.to(self.logits.device)

    def _widths(self, samplings: list[Sampling]) -> list[int]:
        """How many of the likeliest tokens each row sorts: on a GPU as many as the one that needs most, for it would
        wait while rows are told apart, and a graph has them all."""
        widths = [sampling_width(sampling, self.model.vocabulary) for sampling in samplings]
        if self.capture:
            return [next(width for width in self._graph_widths() if width >= max(widths))]
        return [max(widths)] if self.history.is_cuda else widths

    # CUDA graphs

    def capture_graphs(self) -> int:
        """Capture a decode step for each bucket of rows, lengths and widths. Returns how many graphs that made.

        Raises RuntimeError where the model's forward cannot be captured: `drop_graphs` then goes on without.
        """
        if not self.capture:
            return 0
        most = self.slots.rows
        row_buckets = {min(most, 1 << i) for i in range(most.bit_length() + 1)}
        length_buckets = {self.slots.ensure_capacity(most, needed) for needed in range(1, self.model.context + 1)}
        # the largest first: the others then fit into the memory that it took
        for rows in sorted(row_buckets, reverse=True):
            for length in sorted(length_buckets, reverse=True):
                self.forward_graphs[rows, length] = self.capture(partial(self._forward, rows, length))
            for width in sorted(self._graph_widths(), reverse=True):
                self.choose_graphs[rows, width] = self.capture(partial(self._choose, rows, [width]))
        return len(self.forward_graphs) + len(self.choose_graphs)

    def drop_graphs(self) -> None:
        """Go on without graphs. Raises RuntimeError if the device is lost."""
        self.capture = None
        self.forward_graphs.clear()
        self.choose_graphs.clear()
        self.synchronize()
        self.empty_cache()

    def _graph_widths(self) -> list[int]:
        return [0, min(128, self.model.vocabulary), self.model.vocabulary]
