"""The tensors of a step: prefill and decode on transformers' own forward pass, and CUDA graphs of the latter.

Knows rows, not requests; gives back ids, not text. One thread calls it, with inference mode on.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from llm.model import Model
from llm.sampling import Sampling, SamplingRows, sample, width
from llm.slots import Slots, Window

Replay = Callable[[], None]
Capture = Callable[[Callable[[], None]], Replay]


class Ids:
    """The ids that a step chose, on their way to the host."""

    def __init__(self, ids: Tensor):
        self.ready: torch.cuda.Event | None = None
        self.host = ids
        if ids.is_cuda:
            self.host = torch.empty(ids.shape, dtype=ids.dtype, pin_memory=True)
            self.host.copy_(ids, non_blocking=True)
            self.ready = torch.cuda.Event()
            self.ready.record()

    def read(self) -> list[int]:
        """Wait for them, and return an id for each row of the step."""
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
        self.columns = torch.arange(model.context, device=device)
        self.takes_positions = "position_ids" in inspect.signature(model.network.forward).parameters
        self.capture = capture
        self.graphs: dict[tuple[str, int, int], Replay] = {}

    def keep(self, prefix: list[int]) -> None:
        """Read a prefix once: prompts that begin with it are then read from there on."""
        self.put(0, prefix, Sampling())
        self.prefill({0: len(prefix)}).read()
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
        self.positions[row] = kept
        self.history[row] = prompt[0]
        self.history[row, : len(prompt)] = torch.tensor(prompt, device=self.history.device)
        self.sampling.put(row, sampling)
        return kept

    def move(self, source: int, target: int) -> None:
        """Put all of a row into another, and give the first back."""
        self.rows[target] = self.rows[source]
        self.slots.move(source, target)
        self.sampling.move(source, target)
        for tensor in (self.history, self.positions, self.active):
            tensor[target] = tensor[source]
        self.release(source)

    def release(self, row: int) -> None:
        """Give a row back. A step may still compute it: what that writes is overwritten before it is read."""
        del self.rows[row]
        self.active[row] = False
        self.positions[row] = 0

    def prefill(self, counts: dict[int, int]) -> Ids:
        """Read the next `counts[row]` tokens of the prompt of each of these rows, which all stand at the same one.

        A row whose prompt that ends becomes active. Returns an id for each row, in the order of `counts`: the first
        of its answer where its prompt has ended, else of no use.
        """
        start = self.rows[next(iter(counts))].length
        longest = max(counts.values())
        for row, count in counts.items():
            self.rows[row].length += count
        device = self.history.device
        rows = torch.tensor(list(counts), device=device)
        ends = torch.tensor(list(counts.values()), device=device)
        ended = torch.tensor([self.rows[row].active for row in counts], device=device)
        length = start + longest
        self._reach(length)
        self.slots.window = Window(length, start, chosen=rows)
        self.model.padding.real = None
        if self.model.packed and min(counts.values()) < longest:
            self.model.padding.real = (self.columns[:longest] < ends[:, None]).flatten().nonzero()[:, 0]
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
            self._width([self.rows[row].sampling for row in counts if self.rows[row].active]),
        )
        self.history[rows, after] = torch.where(ended, ids, self.history[rows, after])
        self.positions[rows] = after
        self.active[rows] = ended
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
        return Ids(self.history[:rows].gather(1, self.positions[:rows, None])[:, 0])

    def synchronize(self) -> None:
        """Wait for the device. Raises RuntimeError if it is lost."""
        if self.history.is_cuda:
            torch.cuda.synchronize()

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
        ids = sample(self.logits[:rows], history, self.sampling[:rows], after[:, 0], width)[:, None]
        history.scatter_(1, after, torch.where(active, ids, history.gather(1, after)))
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
        """Capture a decode step for each bucket of rows, lengths and widths. Returns how many graphs that made."""
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

    def _graph_widths(self) -> list[int]:
        return [0, min(128, self.model.vocabulary), self.model.vocabulary]

    def _run(self, step: Callable[[int, int], None], rows: int, size: int) -> None:
        self.graphs.get((step.__name__, rows, size), partial(step, rows, size))()


def cuda_capture() -> Capture:
    """Capture as CUDA graphs that share one memory pool: one runs at a time."""
    pool = torch.cuda.graph_pool_handle()

    def capture(step: Callable[[], None]) -> Replay:
        # once outside: kernels are chosen and libraries make their workspaces, which a capture must not do
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            step()
        return graph.replay

    return capture
