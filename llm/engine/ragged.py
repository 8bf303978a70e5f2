"""Ragged passes: the tensors of a step on a GPU with kernels for it, where a pass is a list of tokens of any rows.

A prefill pass reads the next tokens of several prompts side by side, and a decode pass the last token of each row.
Both are CUDA graphs, one for each number of tokens. A prefill pass computes no logits: the last token of each prompt is
read by a decode step.

To import this imports Triton, which a computer without a GPU may lack.
"""

from bisect import bisect_left
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llm.devices import forward, kernel_check, kernels
from llm.devices.gpu import Replay
from llm.devices.model import RAGGED_PREFILL_CHUNK, Model
from llm.engine.runner import Runner
from llm.engine.sampling import SamplingRows, sample_each, sampling_width
from llm.engine.scheduler import Chunk, PassShape, Ragged
from llm.engine.sequence import Sampling
from llm.words import Say, unsaid

BLOCK = 16
"""Tokens of a prompt that read their keys together: as many as a tensor core multiplies at once."""
SIZES = (16, 32, 64, 128, 256, 512, 768, 1024, 1536, RAGGED_PREFILL_CHUNK)
"""Tokens of a prefill pass, padding included: each size is a graph."""


class RaggedRunner(Runner):
    """Reads prompts, and takes rows further, in ragged passes."""

    def __init__(self, model: Model, *args: Any, **kwargs: Any):
        super().__init__(model, *args, **kwargs)
        self.chooses_with_kernel = False
        """`prove_choosing` has shown that this GPU does."""
        self.places = torch.zeros(2, SIZES[-1], dtype=torch.long, device=model.device)
        """The row and the position of each token of a prefill pass, -1 for padding."""
        self.prefill_graphs: dict[int, Replay] = {}
        """By tokens."""

    @staticmethod
    def pass_shape(model: Model, graphs: bool) -> PassShape:
        return Ragged(BLOCK)

    def prefill(self, chunks: list[Chunk]) -> None:
        """Read these chunks. Each is the next one of its sequence's prompt."""
        rows, positions = [], []
        for chunk in chunks:
            padding = -chunk.count % BLOCK
            rows += [chunk.sequence.place] * (chunk.count + padding)
            positions += [*range(chunk.start, chunk.start + chunk.count), *[-1] * padding]
        size = SIZES[bisect_left(SIZES, len(rows))]
        missing = size - len(rows)
        self.places[:, :size] = self._to_device([rows + [0] * missing, positions + [-1] * missing])
        self.prefill_graphs.get(size, partial(self._read, size))()
        for chunk in chunks:
            number = chunk.sequence.place
            self.positions[number : number + 1].fill_(chunk.start + chunk.count)
            self.active[number : number + 1].fill_(chunk.is_last)
            chunk.sequence.cached += chunk.count

    def _read(self, size: int) -> None:
        """Keys and values of the first `size` places."""
        rows, positions = self.places[:, :size]
        at = positions.clamp(min=0)
        self._ragged_logits(kernels.RaggedTokens(rows, positions, BLOCK), self.history[rows, at], at, keep=1)

    def _forward(self, rows: int, length: int) -> None:
        positions = self.positions[:rows]
        ids = self.history[:rows].gather(1, positions[:, None])[:, 0]
        tokens = kernels.RaggedTokens(self.slots.row_numbers[:rows], positions, block=1)
        self.logits[:rows] = self._ragged_logits(tokens, ids, positions, keep=0)

    def _ragged_logits(self, tokens: forward.Ragged, ids: Tensor, positions: Tensor, keep: int) -> Tensor:
        """ids, positions (tokens,) int64; keep: of so many tokens at the end, 0 for all. Returns
        (kept, vocabulary) float32."""
        context = self.slots.context
        pass_ = forward.Pass(context + len(ids), context, slice(0), ragged=tokens)
        return self._logits(pass_, ids[None], positions[None], keep=keep)

    def _ensure_capacity(self, last_row: int, length: int) -> int:
        """Each token reads as many positions as it sees."""
        return self.slots.context

    def _choose(self, rows: int, widths: list[int]) -> None:
        if not (self.chooses_with_kernel and widths[0] <= self._most_sorted):
            super()._choose(rows, widths)
            return
        of_rows = (x[:rows] for x in (self.logits, self.history, self.positions, self.active, self.chosen))
        kernels.choose(*of_rows, **vars(self.sampling[:rows]), width=widths[0])

    @property
    def _most_sorted(self) -> int:
        """The largest width at which the kernel may choose.

        Where a text must not depend on company, it is the only one that chooses: torch sums the probabilities of rows
        in an order that depends on their number, and one row that draws from the whole vocabulary would have the
        others of its step drawn at that width too, where tokens that tie, and sums, may be cut off elsewhere.
        """
        return self.model.vocabulary if self.model.batch_invariant else kernels.MOST_SORTED

    def prove_choosing(self, say: Say = unsaid, seconds: kernel_check.Seconds = kernel_check.on_device) -> bool:
        widths = [width for width in self._graph_widths() if width <= self._most_sorted]
        candidates = [_choosing(self, width) for width in widths]
        if self.model.batch_invariant:
            candidates += [_choosing(self, width, alone=True) for width in widths]
        kernel_check.compile_at_once(candidates, self.model.device)
        self.chooses_with_kernel = kernel_check.proven(candidates, None if self.model.batch_invariant else seconds, say)
        return self.chooses_with_kernel

    def capture_graphs(self) -> int:
        if not self.capture:
            return 0
        for size in reversed(SIZES):
            self.prefill_graphs[size] = self.capture(partial(self._read, size))
        return len(self.prefill_graphs) + super().capture_graphs()

    def drop_graphs(self) -> None:
        self.prefill_graphs.clear()
        super().drop_graphs()


def _choosing(runner: RaggedRunner, width: int, alone: bool = False) -> kernel_check.Candidate:
    """The choice of the next ids of rows with different parameters and lengths. alone: the kernel chooses for one row
    after another, from logits that tie, as those of 16 bits do."""
    rows, context = runner.history.shape
    device, vocabulary = runner.model.device, runner.model.vocabulary
    generator = torch.Generator(device).manual_seed(0)
    logits = 4 * torch.randn(rows, vocabulary, generator=generator, device=device)
    if alone:
        logits = logits.bfloat16().float()
    positions = torch.linspace(0, context - 2, rows, device=device).long()
    history = torch.randint(vocabulary, (rows, context), generator=generator, device=device)
    padded = torch.where(runner.columns[:context] <= positions[:, None], history, history[:, :1])
    sampling, widths = SamplingRows.empty(rows, device), []
    for row in range(rows):
        of_row = Sampling(
            temperature=0.5 * (row % 4),
            top_p=1 - 0.1 * (row % 3),
            top_k=5 * row % (width // 2 + 1) if row % 3 else 0,
            repetition_penalty=1 + row / rows,
            seed=row,
        )
        sampling.put(row, of_row)
        needs_many = sampling_width(of_row, vocabulary) > kernels.MOST_SORTED
        widths.append(width if needs_many else min(width, kernels.MOST_SORTED))

    def kernel() -> Tensor:
        chosen, after = torch.empty_like(positions), positions.clone()
        active = torch.ones_like(positions, dtype=torch.bool)
        for part in [slice(row, row + 1) for row in range(rows)] if alone else [slice(rows)]:
            of_rows = (x[part] for x in (logits, history, after, active, chosen))
            kernels.choose(*of_rows, **vars(sampling[part]), width=width)
        return chosen

    def operations() -> Tensor:
        return sample_each(logits, padded, sampling, positions + 1, widths)

    return kernel_check.Candidate(f"la elección del token entre {width}", kernel, operations, exact=operations)
