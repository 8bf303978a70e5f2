"""The tensors of a step: prefill and decode on transformers' own forward pass, and CUDA graphs of the latter.

Knows rows and ids, not text. One thread calls it, with inference mode on. On a GPU nothing here makes that thread wait
for the device but `PendingIds.read` and `synchronize`: numbers are written by fills, lists by non-blocking copies from
pinned memory, and all of it stays in the order of one stream.

A step that fails, for lack of memory or because its device did, leaves what the host knows of each row as it was: the
step can be asked for again, or its rows released.
"""

import inspect
from functools import partial

import torch
from torch import Tensor

from llm.devices import forward, memory
from llm.devices.attention import in_steps
from llm.devices.gpu import Capture, Replay
from llm.devices.model import Model
from llm.devices.threads import Threads
from llm.engine.prefixes import Prefixes, beginning, count
from llm.engine.sampling import SamplingRows, sample_each, sampling_width
from llm.engine.scheduler import Chunk, PassShape, Rectangle
from llm.engine.sequence import Sampling, Sequence
from llm.engine.slots import KeyValues, Slots
from llm.words import Say, unsaid

MULTIPLE = 8
"""A GPU's attention pads the length that it reads to a multiple of this, once in every layer unless it is one."""


class PendingIds:
    """The ids that a step chooses, on their way to the host. Made before the step, for which there may be no memory."""

    def __init__(self, rows: int, device: torch.device):
        # only CUDA copies without waiting, and only to memory that the system cannot move: elsewhere the ids would be
        # read before they have arrived
        self._cuda = device.type == "cuda"
        self._host = torch.empty(rows, dtype=torch.long, pin_memory=self._cuda)
        self._copied = torch.cuda.Event() if self._cuda else None

    def copy(self, ids: Tensor) -> None:
        """Begin to copy the ids of the step, (rows,) int64."""
        self._host.copy_(ids, non_blocking=self._cuda)
        if self._copied:
            self._copied.record()

    def read(self) -> list[int]:
        """Wait for them. Returns an id for each row of the step, NOT_A_NUMBER where its logits are none."""
        if self._copied:
            self._copied.synchronize()
        return self._host.tolist()


class Runner:
    """Reads prompts into rows, and takes the rows a token further.

    What a row holds on the device: `history`, its ids so far, padded with the first; `positions`, the position of its
    last id, whose key and value are not yet in the cache; its sampling; and `active`, whether it is prefilled.
    """

    def __init__(
        self,
        model: Model,
        rows: int,
        capture: Capture | None = None,
        prefixes: Prefixes[KeyValues] | None = None,
        spare: int = 0,
    ):
        """spare: the tokens of prefixes for which there is memory beside that of the rows."""
        device = model.device
        if device.type == "cuda":
            # this thread's current device is another, where the model is not on the first
            torch.cuda.set_device(device)
        self.model = model
        self.shape = self.pass_shape(model, graphs=capture is not None)
        self.cuda = device.type == "cuda"
        self.rows: dict[int, Sequence] = {}
        # whole steps of the CPU's attention, also at the end of a context that is none
        longest = in_steps(model.context) if model.batch_invariant and model.tile else model.context
        self.prefixes = Prefixes() if prefixes is None else prefixes
        grows = device.type == "cpu" and not model.ragged
        self.slots = Slots(model.layers, rows, longest, device, grows, self.prefixes, spare)
        self.history = torch.zeros(rows, model.context, dtype=torch.long, device=device)
        self.positions = torch.zeros(rows, dtype=torch.long, device=device)
        self.active = torch.zeros(rows, dtype=torch.bool, device=device)
        self.sampling = SamplingRows.empty(rows, device)
        self.logits = torch.zeros(rows, model.vocabulary, device=device)
        self.chosen = torch.zeros(rows, dtype=torch.long, device=device)
        self.columns = torch.arange(longest, device=device)
        self.takes_positions = "position_ids" in inspect.signature(model.network.forward).parameters
        self.threads = Threads() if device.type == "cpu" else None
        self.capture = capture
        self.forward_graphs: dict[tuple[int, int], Replay] = {}
        """By rows and length."""
        self.choose_graphs: dict[tuple[int, int], Replay] = {}
        """By rows and width."""

    @staticmethod
    def pass_shape(model: Model, graphs: bool) -> PassShape:
        """How this model's passes over prompts are laid out."""
        multiple = MULTIPLE if graphs or model.device.type != "cpu" else 1
        return Rectangle(model.context, multiple, model.packed, model.mixes_starts)

    def put(self, sequence: Sequence, rows: int = 1) -> None:
        """Give a sequence a free row. What the cache already holds of its prompt is then in `cached`.

        rows: how many will soon be in use. A cache that grows for all of them at once is copied once."""
        prompt = sequence.prompt
        cached, blocks = self.prefixes.use(sequence.ids)
        number = next(number for number in range(self.slots.rows) if number not in self.rows)
        if cached:
            # for its other tokens too, which the next pass reads
            self._ensure_capacity(max(number, rows - 1), len(prompt))
            self.slots.load(number, blocks)
        self.positions[number : number + 1].fill_(cached)
        self.history[number : number + 1].fill_(prompt[0])
        self.history[number, : len(prompt)] = self._to_device(prompt)
        self.sampling.put(number, sequence.sampling)
        sequence.row, sequence.cached, sequence.reused = number, cached, cached
        sequence.prefill_end = len(prompt) - self.shape.left_to_decode
        self.active[number : number + 1].fill_(sequence.prefilled)
        self.rows[number] = sequence

    def share(self, sequence: Sequence) -> None:
        """Hold what its row has for other sequences that begin with the same tokens.

        Where the model is batch-invariant, only what a prefill pass read: a decode step sums in another order than the
        pass that would read these tokens as a prompt.
        """
        if not self._has_row(sequence):
            return
        known = sequence.prefill_end if self.model.batch_invariant else count(sequence.ids)
        ids = beginning(sequence.ids, min(sequence.cached, known))
        self.prefixes.add(ids, partial(self.slots.block, sequence.place))

    def release(self, sequence: Sequence) -> None:
        """Take a sequence's row back, once or again. A step may still compute the row: what that writes is overwritten
        before it is read."""
        if self._has_row(sequence):
            self._deactivate(sequence.place)
            del self.rows[sequence.place]

    def clear(self, sequence: Sequence) -> None:
        """Make a place usable again whose keys or values may be NaN. Where another sequence has the place by now, that
        one meets the NaN too, and is cleared then."""
        if self._has_row(sequence) or sequence.row not in self.rows:
            self.slots.clear(sequence.place)

    def _deactivate(self, number: int) -> None:
        """A graph still computes the row: at position 0, which every capacity has."""
        self.active[number : number + 1].fill_(False)
        self.positions[number : number + 1].fill_(0)

    def _has_row(self, sequence: Sequence) -> bool:
        return sequence.row is not None and self.rows.get(sequence.row) is sequence

    def _compact(self) -> None:
        """Move rows into the holes that others left, as far as a decode step then computes fewer."""
        computed = self._rows_computed(len(self.rows))
        holes = (number for number in range(computed) if number not in self.rows)
        for number in sorted(number for number in self.rows if number >= computed):
            self._move(self.rows[number], next(holes))

    def _rows_computed(self, rows: int) -> int:
        """How many rows a decode step computes where the first `rows` are in use: a graph has a power of two."""
        return min(self.slots.rows, 1 << (rows - 1).bit_length()) if self.capture else rows

    def _move(self, sequence: Sequence, target: int) -> None:
        source = sequence.place
        self.slots.move(source, target, sequence.cached)
        self.sampling.move(source, target)
        for tensor in (self.history, self.positions, self.active):
            tensor[target] = tensor[source]
        self._deactivate(source)
        # last, as all that the host knows: until then a device that fails leaves the row where it was
        self.rows[target] = self.rows.pop(source)
        sequence.row = target

    def prefill(self, chunks: list[Chunk]) -> PendingIds | None:
        """Read these chunks. Each is the next one of its sequence's prompt.

        Returns an id for each chunk, in their order: the first of the answer where the prompt ends, else of no use.
        None where the end of each prompt is left to a decode step.
        """
        assert isinstance(self.shape, Rectangle)
        pending = PendingIds(len(chunks), self.history.device)
        end, width = self.shape.end(chunks), self.shape.width(chunks)
        starts, counts = [chunk.start for chunk in chunks], [chunk.count for chunk in chunks]
        places = [chunk.sequence.place for chunk in chunks]
        is_last = [int(chunk.is_last) for chunk in chunks]
        rows, first, ends, is_last = self._to_device([places, starts, counts, is_last])
        # for whole prompts: each time that a cache grows, all of its rows are copied
        self._ensure_capacity(max(self.rows), max(end, self._longest_prompt))
        positions = first[:, None] + self.columns[:width]
        prompt_tokens = None
        if self.model.packed and min(counts) < width:
            prompt_tokens = (self.columns[:width] < ends[:, None]).flatten().nonzero()[:, 0]
        side_by_side = places == [*range(places[0], places[0] + len(places))]
        logits = self._logits(
            forward.Pass(
                length=end,
                start=end - width,
                rows=slice(places[0], places[0] + len(places)) if side_by_side else rows,
                positions=positions if min(starts) < max(starts) else None,
                starts=starts,
                counts=counts,
                tokens=len(chunks) * width,
                shared=_shared(chunks),
                prompt_tokens=prompt_tokens,
                tile=self.model.tile,
            ),
            self.history[rows[:, None], positions],
            positions,
            keep=ends[:, None] - 1,
        )
        after = first + ends
        widths = self._widths([chunk.sequence.sampling for chunk in chunks])
        ids = sample_each(logits, self.history[rows, :end], self.sampling[rows], after, widths)
        pending.copy(ids)
        self.history[rows, after] = torch.where(is_last > 0, ids.clamp(min=0), self.history[rows, after])
        self.positions[rows] = after
        self.active[rows] = is_last > 0
        for chunk in chunks:
            chunk.sequence.cached += chunk.count
        return pending

    def decode(self) -> PendingIds:
        """Take every prefilled row one token further. Returns an id for each row by its number, of no use for one
        that is not prefilled."""
        self._compact()
        decoding = [sequence for sequence in self.rows.values() if sequence.prefilled]
        rows = 1 + max(sequence.place for sequence in decoding)
        sampling = [self.rows[number].sampling for number in range(rows) if number in self.rows]
        widths = self._widths(sampling)
        rows = self._rows_computed(rows)
        pending = PendingIds(rows, self.history.device)
        length = self._ensure_capacity(max(self.rows), 1 + max(sequence.cached for sequence in decoding))
        self.forward_graphs.get((rows, length), partial(self._forward, rows, length))()
        self.choose_graphs.get((rows, widths[0]), partial(self._choose, rows, widths))()
        pending.copy(self.chosen[:rows])
        for sequence in decoding:
            sequence.cached += 1
        return pending

    def synchronize(self) -> None:
        """Wait for the device. Raises RuntimeError if it is lost."""
        if self.cuda:
            torch.cuda.synchronize()

    def fit_threads(self) -> None:
        """Between two steps, on a CPU: compute with as many threads as other programs leave cores for."""
        if self.threads:
            self.threads.fit()

    def rest(self) -> None:
        """While there are no rows: give the system the memory of the cache and of prefixes."""
        self.slots.shrink()
        self.give_up_prefixes()
        memory.trim()

    def give_up_prefixes(self) -> None:
        """Give the memory of prefixes, but the template's, to whoever needs it."""
        self.prefixes.clear()
        self.empty_cache()

    def empty_cache(self) -> None:
        """Return to the device the memory that torch keeps for later."""
        if self.cuda:
            memory.empty_cuda_cache()

    def _to_device(self, numbers: list[int] | list[list[int]]) -> Tensor:
        """Integers as an int64 tensor on the device, on CUDA without waiting for it."""
        host = torch.tensor(numbers)
        if self.cuda:
            return host.pin_memory().to(self.history.device, non_blocking=True)
        return host.to(self.history.device)

    def _ensure_capacity(self, last_row: int, length: int) -> int:
        """For `length` positions of each row up to `last_row`. Returns how many a decode step reads."""
        # a decode step also writes to rows that are still being prefilled, at the position that they read next
        used = max((sequence.cached + (not sequence.prefilled) for sequence in self.rows.values()), default=0)
        rows = 1 + max([last_row, *self.rows])
        return self.slots.ensure_capacity(rows, max(length, used), self._longest_prompt)

    @property
    def _longest_prompt(self) -> int:
        return max((len(sequence.prompt) for sequence in self.rows.values()), default=0)

    def _forward(self, rows: int, length: int) -> None:
        """Logits of the next id of each of the first `rows` rows, which read `length` positions."""
        positions = self.positions[:rows, None]
        ids = self.history[:rows].gather(1, positions)
        padding = self.model.padding(rows)
        pass_ = forward.Pass(length, length - 1, slice(rows), positions, padding=padding, tile=self.model.tile)
        ids, positions = pass_.with_padding(ids), pass_.with_padding(positions)
        logits = self._logits(pass_, ids, positions, mask=self.columns[:length] <= positions)
        self.logits[:rows] = logits[:rows]

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
        pass_: forward.Pass,
        ids: Tensor,
        positions: Tensor,
        mask: Tensor | None = None,
        keep: Tensor | int = 1,
    ) -> Tensor:
        """One pass. ids, positions (rows, tokens) int64; mask (rows, length) bool; keep: transformers'
        `logits_to_keep`, of each row the one token whose logits are wanted, or of a ragged pass as many as there shall
        be, 0 for all. Returns (rows, vocabulary) float32, for a ragged pass (tokens, vocabulary)."""
        extra = {"position_ids": positions} if self.takes_positions else {}
        with forward.run(pass_):
            output = self.model.network(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=self.slots,
                use_cache=True,
                logits_to_keep=keep,
                **extra,
            )
        wanted = output.logits[0] if pass_.ragged else output.logits[:, -1]
        logits: Tensor = wanted[:, : self.model.vocabulary].float()
        # some models have logits for fewer ids than they read: the others are never chosen
        if missing := self.model.vocabulary - logits.shape[-1]:
            logits = torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)
        return logits.to(self.logits.device)

    def _widths(self, samplings: list[Sampling]) -> list[int]:
        """How many of the likeliest tokens each row sorts. On a GPU all rows sort as many as the row that needs most: a
        graph has one width, and to sort rows by width would make the host wait."""
        widths = [sampling_width(sampling, self.model.vocabulary) for sampling in samplings]
        # batch-invariant too: one kernel chooses for all rows, by each row's own width
        if self.capture or (self.model.ragged and self.model.batch_invariant):
            return [next(width for width in self._graph_widths() if width >= max(widths))]
        return [max(widths)] if self.cuda else widths

    # CUDA graphs

    def prove_choosing(self, say: Say = unsaid) -> bool:
        """From now on choose with a kernel, if this GPU then chooses the same, and sooner. Returns whether it does, and
        says why not."""
        return False

    def capture_graphs(self) -> int:
        """Capture a decode step for each bucket of rows, lengths and widths. Returns how many graphs that made.

        Raises RuntimeError where the model's forward cannot be captured: `drop_graphs` then goes on without.
        """
        if not self.capture:
            return 0
        most = self.slots.rows
        row_buckets = {min(most, 1 << i) for i in range(most.bit_length() + 1)}
        # the last id of a whole context is never read
        length_buckets = {self._ensure_capacity(most - 1, needed) for needed in range(1, self.model.context)}
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


def _shared(chunks: list[Chunk]) -> int:
    """How many tokens before these chunks are the same in all of their prompts, if all of them are."""
    start = chunks[0].start
    begins = beginning(chunks[0].sequence.ids, start)
    alike = all(chunk.start == start and chunk.sequence.ids.startswith(begins) for chunk in chunks)
    return start if alike else 0
