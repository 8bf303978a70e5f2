"""The tensors of a step: prefill and decode on transformers' own forward pass, and CUDA graphs of the latter.

Knows rows, not requests; gives back ids, not text. One thread calls it, with inference mode on. On a GPU nothing here
makes that thread wait for the device but `Ids.read` and `synchronize`: numbers are written by fills, lists by
non-blocking copies from pinned memory, and all of it stays in the order of one stream.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from llm.model import Model
from llm.sampling import Sampling, SamplingRows, sample, width
from llm.slots import Slots, Window

Replay = Callable[[], None]
Capture = Callable[[Callable[[], None]], Replay]

MULTIPLE = 8
"""Positions to whose multiple a GPU's attention fills up what it reads; unless it is one, in every layer anew."""


class Ids:
    """The ids that a step chose, on their way to the host."""

    def __init__(self, ids: Tensor):
        self.ready: torch.cuda.Event | None = None
        self.host = torch.empty(ids.shape, dtype=ids.dtype, pin_memory=ids.is_cuda)
        self.host.copy_(ids, non_blocking=True)
        if ids.is_cuda:
            self.ready = torch.cuda.Event()
            self.ready.record()

    def read(self) -> list[int]:
        """Wait for them, and return an id for each row of the step, NOT_A_NUMBER where its logits are none."""
        if self.ready:
            self.ready.synchronize()
        return self.host.tolist()


@dataclass
class Row:
    """What the host knows of a row in use."""

    prompt: int
    """Tokens of its prompt."""
    sampling: Sampling
    length: int = 0
    """Tokens whose keys and values are in the cache."""

    @property
    def active(self) -> bool:
        return self.length >= self.prompt


class Runner:
    """Reads prompts into rows, `rows` of them at the most, and takes the rows a token further.

    What a row holds on the device: `history`, its ids so far, filled up with the first; `positions`, where its last
    id stands, whose key and value are not yet in the cache; its sampling; and whether it is `active`: its prompt is
    read, and a step moves it on.
    """

    def __init__(self, model: Model, rows: int, capture: Capture | None = None):
        device = model.device
        self.model = model
        self.rows: dict[int, Row] = {}
        self.prefix: list[int] = []
        """What `keep` was given."""
        self.slots = Slots(model.layers, rows, model.context, device, grows=device.type == "cpu")
        self.history = torch.zeros(rows, model.context, dtype=torch.long, device=device)
        self.positions = torch.zeros(rows, dtype=torch.long, device=device)
        self.active = torch.zeros(rows, dtype=torch.bool, device=device)
        self.sampling = SamplingRows.empty(rows, device)
        self.logits = torch.zeros(rows, model.vocabulary, device=device)
        self.chosen = torch.zeros(rows, dtype=torch.long, device=device)
        self.columns = torch.arange(model.context, device=device)
        self.takes_positions = "position_ids" in inspect.signature(model.network.forward).parameters
        self.capture = capture
        self.multiple = MULTIPLE if capture or device.type != "cpu" else 1
        self.graphs: dict[tuple[str, int, int], Replay] = {}

    def keep(self, prefix: list[int], piece: int) -> None:
        """Read a prefix once, in pieces: prompts that begin with it are then read from there on."""
        self.put(0, prefix, Sampling())
        while left := len(prefix) - self.rows[0].length:
            self.prefill({0: min(left, piece)}).read()
        self.slots.keep(0, len(prefix))
        self.release(0)
        self.prefix = prefix

    def put(self, row: int, prompt: list[int], sampling: Sampling) -> int:
        """Give a row to a request. Returns how much of its prompt is in the cache; the rest is read by `prefill`."""
        kept = len(self.prefix)
        if kept == len(prompt) or prompt[:kept] != self.prefix:
            kept = 0
        self.rows[row] = Row(len(prompt), sampling, length=kept)
        if kept:
            self._reach(kept)
            self.slots.recall(row)
        self.positions[row : row + 1].fill_(kept)
        self.history[row : row + 1].fill_(prompt[0])
        self.history[row, : len(prompt)] = self._sent(prompt)
        self.sampling.put(row, sampling)
        return kept

    def move(self, source: int, target: int) -> None:
        """Put all of a row into another, and give the first back."""
        self.slots.move(source, target, self.rows[source].length)
        self.sampling.move(source, target)
        for tensor in (self.history, self.positions, self.active):
            tensor[target] = tensor[source]
        self.rows[target] = self.rows[source]
        self.release(source)

    def release(self, row: int) -> None:
        """Give a row back. A step may still compute it: what that writes is overwritten before it is read."""
        # not there where `put` has failed
        self.rows.pop(row, None)
        self.active[row : row + 1].fill_(False)
        self.positions[row : row + 1].fill_(0)

    def clear(self, row: int) -> None:
        """Make a row usable again whose keys or values may be NaN."""
        self.slots.clear(row)

    def tokens(self, counts: dict[int, int]) -> int:
        """How many tokens `prefill` computes, the padding of the shorter prompts included where it is computed."""
        if self.model.packed:
            return sum(counts.values())
        start = self.rows[next(iter(counts))].length
        return len(counts) * (self._filled_up(start + max(counts.values())) - start)

    def _filled_up(self, length: int) -> int:
        return min(self.slots.context, -(-length // self.multiple) * self.multiple)

    def prefill(self, counts: dict[int, int]) -> Ids:
        """Read the next `counts[row]` tokens of the prompt of each of these rows, which all stand at the same one.

        A row whose prompt that ends becomes active. Returns an id for each row, in the order of `counts`: the first
        of its answer where its prompt has ended, else of no use.
        """
        # nothing that the host knows changes before the device has taken all of it: without memory it is asked again
        start = self.rows[next(iter(counts))].length
        length = self._filled_up(start + max(counts.values()))
        has_ended = [start + count == self.rows[row].prompt for row, count in counts.items()]
        rows, ends, ended = self._sent([list(counts), list(counts.values()), list(map(int, has_ended))])
        self._reach(length)
        self.slots.window = Window(length, start, chosen=rows)
        self.model.padding.real = None
        if self.model.packed and min(counts.values()) < length - start:
            self.model.padding.real = (self.columns[: length - start] < ends[:, None]).flatten().nonzero()[:, 0]
        logits = self._logits(
            self.history[rows, start:length],
            positions=self.columns[start:length].expand(len(counts), -1),
            keep=ends[:, None] - 1,
        )
        after = start + ends
        ids = sample(
            logits,
            self.history[rows, :length],
            self.sampling[rows],
            after,
            self._width([self.rows[row].sampling for row, last in zip(counts, has_ended, strict=True) if last]),
        )
        self.history[rows, after] = torch.where(ended > 0, ids.clamp(min=0), self.history[rows, after])
        self.positions[rows] = after
        self.active[rows] = ended > 0
        for row, count in counts.items():
            self.rows[row].length += count
        return Ids(ids)

    def decode(self) -> Ids:
        """Take every active row one token further. Returns an id for each row, of no use where it is not active."""
        running = {number: row for number, row in self.rows.items() if row.active}
        for row in running.values():
            row.length += 1
        rows = 1 + max(running)
        if self.capture:
            rows = min(self.slots.rows, 1 << (rows - 1).bit_length())
        length = self._reach(max(row.length for row in running.values()))
        self._run(self._forward, rows, length)
        self._run(self._choose, rows, self._width([row.sampling for row in running.values()]))
        return Ids(self.chosen[:rows])

    def synchronize(self) -> None:
        """Wait for the device. Raises RuntimeError if it is lost."""
        if self.history.is_cuda:
            torch.cuda.synchronize()

    def give_back_memory(self) -> None:
        """Give the device the memory back that torch keeps for later."""
        if self.history.is_cuda:
            torch.cuda.empty_cache()

    def _sent(self, numbers: Sequence[object]) -> Tensor:
        """Integers, or lists of them, as an int64 tensor on the device, without waiting for it."""
        host = torch.tensor(numbers, pin_memory=self.history.is_cuda)
        return host.to(self.history.device, non_blocking=True)

    def _reach(self, length: int) -> int:
        # a row whose prompt is still being read is computed too: what that writes lies behind what was read
        used = max(row.length + (not row.active) for row in self.rows.values())
        return self.slots.reach(1 + max(self.rows), max(length, used))

    def _forward(self, rows: int, length: int) -> None:
        """Logits of the next id of each of the first `rows` rows, which read `length` positions."""
        self.model.padding.real = None
        positions = self.positions[:rows, None]
        self.slots.window = Window(length, length - 1, positions=self.positions[:rows])
        self.logits[:rows] = self._logits(
            self.history[:rows].gather(1, positions), positions, mask=self.columns[:length] <= positions
        )

    def _choose(self, rows: int, width: int) -> None:
        """From those logits the next id, into the history of each active row."""
        history, active = self.history[:rows], self.active[:rows, None]
        after = self.positions[:rows, None] + active
        ids = sample(self.logits[:rows], history, self.sampling[:rows], after[:, 0], width)
        self.chosen[:rows] = ids
        # NOT_A_NUMBER is for the host to see; the embedding needs an id
        history.scatter_(1, after, torch.where(active, ids[:, None].clamp(min=0), history.gather(1, after)))
        self.positions[:rows] = after[:, 0]

    def _logits(self, ids: Tensor, positions: Tensor, mask: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        """One pass. ids, positions (rows, tokens) int64; mask (rows, length) bool; keep (rows, 1) int64: the token
        whose logits are wanted. Returns (rows, vocabulary) float32."""
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
        return logits.to(self.logits.device)

    def _width(self, samplings: list[Sampling]) -> int:
        exact = width(samplings, self.model.vocabulary)
        return next(w for w in self._graph_widths() if w >= exact) if self.capture else exact

    # CUDA graphs

    def capture_graphs(self) -> int:
        """Capture a decode step for each bucket of rows, lengths and widths. Returns how many graphs that made.

        Raises RuntimeError where the model's forward cannot be captured: `drop_graphs` then goes on without.
        """
        if not self.capture:
            return 0
        most = self.slots.rows
        row_buckets = {min(most, 1 << i) for i in range(most.bit_length() + 1)}
        length_buckets = {self.slots.reach(most, needed) for needed in range(1, self.model.context + 1)}
        # the largest first: the others then fit into the memory that it took
        for rows in sorted(row_buckets, reverse=True):
            for step, sizes in ((self._forward, length_buckets), (self._choose, self._graph_widths())):
                for size in sorted(sizes, reverse=True):
                    self.graphs[step.__name__, rows, size] = self.capture(partial(step, rows, size))
        return len(self.graphs)

    def drop_graphs(self) -> None:
        """Go on without graphs. Raises RuntimeError if the device is lost."""
        self.capture = None
        self.graphs.clear()
        self.synchronize()
        self.give_back_memory()

    def _graph_widths(self) -> list[int]:
        return [0, min(128, self.model.vocabulary), self.model.vocabulary]

    def _run(self, step: Callable[[int, int], None], rows: int, size: int) -> None:
        self.graphs.get((step.__name__, rows, size), partial(step, rows, size))()


def cuda_capture() -> Capture:
    """Capture as CUDA graphs that share one memory pool and one stream: one runs at a time."""
    # for each stream that it meets, cuBLAS keeps a workspace for good
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def capture(step: Callable[[], None]) -> Replay:
        current = torch.cuda.current_stream()
        # once outside: kernels are chosen and libraries make their workspaces, which a capture must not do
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            step()
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                step()
        finally:
            # a capture that fails leaves its own stream as the current one
            torch.cuda.set_stream(current)
        return graph.replay

    return capture
