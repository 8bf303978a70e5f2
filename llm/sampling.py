"""Logits to next ids, each row by its own parameters. Knows nothing of requests or of text."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How one request chooses its tokens. temperature 0 is greedy; top_p 1, top_k 0, repetition_penalty 1 are off."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


@dataclass
class SamplingRows:
    """The same parameters on the device, one row a request. All (rows,), float32 but top_k, which is int64."""

    temperature: Tensor
    top_p: Tensor
    top_k: Tensor
    repetition_penalty: Tensor

    @classmethod
    def empty(cls, rows: int, device: torch.device) -> "SamplingRows":
        return cls(
            temperature=torch.zeros(rows, device=device),
            top_p=torch.ones(rows, device=device),
            top_k=torch.zeros(rows, dtype=torch.long, device=device),
            repetition_penalty=torch.ones(rows, device=device),
        )

    def put(self, row: int, sampling: Sampling) -> None:
        self.temperature[row] = sampling.temperature
        self.top_p[row] = sampling.top_p
        self.top_k[row] = sampling.top_k
        self.repetition_penalty[row] = sampling.repetition_penalty

    def __getitem__(self, rows: slice | Tensor) -> "SamplingRows":
        return SamplingRows(
            self.temperature[rows], self.top_p[rows], self.top_k[rows], self.repetition_penalty[rows]
        )

    def move(self, source: int, target: int) -> None:
        for tensor in (self.temperature, self.top_p, self.top_k, self.repetition_penalty):
            tensor[target] = tensor[source]


def width(samplings: list[Sampling], vocab: int) -> int:
    """How many of the likeliest tokens a step has to sort for these requests: 0 where all are greedy.

    Twice the largest top_k, as a power of two: top_k keeps every token that ties with its last one, as
    transformers does, and bfloat16 logits tie often.
    """
    drawn = [s.top_k or vocab for s in samplings if not s.greedy]
    return min(vocab, 1 << (2 * max(drawn) - 1).bit_length()) if drawn else 0


def penalize(logits: Tensor, history: Tensor, penalty: Tensor) -> Tensor:
    """The repetition penalty of CTRL (Keskar et al., 2019), as transformers' processor computes it.

    logits (rows, vocab) float32; history (rows, length) int64, the ids so far, filled up with any of them;
    penalty (rows,). Returns (rows, vocab) float32.
    """
    score = logits.gather(1, history)
    penalty = penalty[:, None]
    return logits.scatter(1, history, torch.where(score < 0, score * penalty, score / penalty))


def nucleus(logits: Tensor, rows: SamplingRows, width: int) -> tuple[Tensor, Tensor]:
    """The tokens that may be drawn, and their probabilities: temperature, then top_k, then top_p.

    logits (rows, vocab) float32. Returns ids (rows, width) int64, likeliest first, and probabilities
    (rows, width) float32 that sum to 1, 0 where a token is filtered out. Nucleus sampling is that of Holtzman
    et al., 2019; what is kept is what transformers' logits processors keep.
    """
    top, ids = (logits / rows.temperature.clamp(min=1e-4)[:, None]).topk(width, dim=-1)
    last = torch.where(rows.top_k > 0, rows.top_k, width).clamp(max=width) - 1
    top = top.masked_fill(top < top.gather(1, last[:, None]), -torch.inf)
    # summed from the unlikeliest up, as transformers does, so that the rounding is the same
    tail = top.softmax(-1).flip(-1).cumsum(-1).flip(-1)
    cut = tail <= 1 - rows.top_p[:, None]
    cut[:, 0] = False
    return ids, top.masked_fill(cut, -torch.inf).softmax(-1)


def sample(logits: Tensor, history: Tensor, rows: SamplingRows, uniform: Tensor, width: int) -> Tensor:
    """The next id of each row: the likeliest where its temperature is 0, else drawn by its number in [0, 1).

    logits (rows, vocab) float32; history (rows, length) int64; uniform (rows,) float32. Returns (rows,) int64.
    """
    logits = penalize(logits, history, rows.repetition_penalty)
    likeliest = logits.argmax(-1)
    if width == 0:
        return likeliest
    ids, probabilities = nucleus(logits, rows, width)
    reached = probabilities.cumsum(-1) > uniform[:, None]
    # rounding can leave the sum below the number: then the likeliest, which is never filtered out
    drawn = ids.gather(1, reached.byte().argmax(-1, keepdim=True))[:, 0]
    return torch.where(rows.temperature == 0, likeliest, drawn)
