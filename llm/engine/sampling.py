"""Logits to next ids, each row by its own parameters. Knows nothing of requests or of text.

CUDA graphs capture a step of it, so it reads nothing back to the host and makes no tensor from the host's numbers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llm.engine.sequence import Sampling

NOT_A_NUMBER = -1
"""The id of a row whose likeliest logit is NaN or infinite."""


@dataclass
class SamplingRows:
    """The same parameters on the device, one row a request. All (rows,), float32 but top_k and seed, int64."""

    temperature: Tensor
    top_p: Tensor
    top_k: Tensor
    repetition_penalty: Tensor
    seed: Tensor
    """Mixed once, here, instead of at every token."""

    @classmethod
    def empty(cls, rows: int, device: torch.device) -> "SamplingRows":
        return cls(
            temperature=torch.zeros(rows, device=device),
            top_p=torch.ones(rows, device=device),
            top_k=torch.zeros(rows, dtype=torch.long, device=device),
            repetition_penalty=torch.ones(rows, device=device),
            seed=torch.zeros(rows, dtype=torch.long, device=device),
        )

    def put(self, row: int, sampling: Sampling) -> None:
        values = vars(sampling) | {"seed": _signed(_mix((sampling.seed + _GAMMA) % 2**64))}
        for name, tensor in vars(self).items():
            # a fill: to assign a number to one element would make the host wait for the device
            tensor[row : row + 1].fill_(values[name])

    def move(self, source: int, target: int) -> None:
        for tensor in vars(self).values():
            tensor[target] = tensor[source]

    def __getitem__(self, rows: slice | Tensor) -> "SamplingRows":
        return SamplingRows(*(tensor[rows] for tensor in vars(self).values()))


def sampling_width(sampling: Sampling, vocab: int) -> int:
    """How many of the likeliest tokens a step has to sort for this request: 0 where it is greedy.

    Twice its top_k, as a power of two: top_k keeps every token that ties with its last one, as transformers does, and
    bfloat16 logits tie often.
    """
    if sampling.greedy:
        return 0
    return min(vocab, 1 << (2 * (sampling.top_k or vocab) - 1).bit_length())


def penalize(logits: Tensor, history: Tensor, penalty: Tensor) -> Tensor:
    """The repetition penalty of CTRL (Keskar et al., 2019), as transformers' processor computes it.

    logits (rows, vocab) float32; history (rows, length) int64, the ids so far, padded with any of them;
    penalty (rows,). Returns (rows, vocab) float32.
    """
    score = logits.gather(1, history)
    penalty = penalty[:, None]
    return logits.scatter(1, history, torch.where(score < 0, score * penalty, score / penalty))


def nucleus(logits: Tensor, rows: SamplingRows, width: int) -> tuple[Tensor, Tensor]:
    """The tokens that may be drawn, and their probabilities: temperature, then top_k, then top_p.

    logits (rows, vocab) float32. Returns ids (rows, width) int64, likeliest first, and probabilities
    (rows, width) float32 that sum to 1, 0 where a token is filtered out. Nucleus sampling is that of Holtzman
    et al., 2019; the filter keeps the tokens that transformers' logits processors keep.
    """
    top, ids = (logits / rows.temperature.clamp(min=1e-4)[:, None]).topk(width, dim=-1)
    last = torch.where(rows.top_k > 0, rows.top_k, width).clamp(max=width) - 1
    top = top.masked_fill(top < top.gather(1, last[:, None]), -torch.inf)
    # summed from the unlikeliest up, as transformers does, so that the rounding is the same
    tail = top.softmax(-1).flip(-1).cumsum(-1).flip(-1)
    cut = tail <= 1 - rows.top_p[:, None]
    cut[:, :1].fill_(False)
    return ids, top.masked_fill(cut, -torch.inf).softmax(-1)


def gumbel(seed: Tensor, position: Tensor, ids: Tensor) -> Tensor:
    """A number of the standard Gumbel distribution for each id of each row, the same wherever it is computed.

    seed, position (rows,) int64, the seed as SamplingRows has it; ids (rows, width) int64. Returns (rows, width)
    float32. The bits are those of SplitMix64 (Steele, Lea and Flood, 2014) from that seed after `position` steps,
    its state moved on by the id: no state lives between steps.
    """
    bits = _mixed((seed + position * _signed(_GAMMA))[:, None] + ids)
    # 23 bits and a half: never 0 or 1 in float32
    uniform = (((bits >> 41) & 0x7FFFFF) + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform))


_GAMMA, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _mix(bits: int) -> int:
    """SplitMix64's function of its state, 64 bits without a sign."""
    bits = (bits ^ bits >> 30) * _FIRST % 2**64
    bits = (bits ^ bits >> 27) * _SECOND % 2**64
    return bits ^ bits >> 31


def _mixed(bits: Tensor) -> Tensor:
    """The same of each element of an int64 tensor, which torch shifts with its sign. Without the last step, which
    changes no bit that `gumbel` takes."""
    bits = (bits ^ ((bits >> 30) & (1 << 34) - 1)) * _signed(_FIRST)
    return (bits ^ ((bits >> 27) & (1 << 37) - 1)) * _signed(_SECOND)


def _signed(bits: int) -> int:
    """The int64 of the same 64 bits."""
    return bits - 2**64 if bits >= 2**63 else bits


def sample_each(logits: Tensor, history: Tensor, rows: SamplingRows, position: Tensor, widths: list[int]) -> Tensor:
    """`sample` for rows of different widths, each with its own: where tokens tie, which come first depends on it."""
    if len(set(widths)) == 1:
        return sample(logits, history, rows, position, widths[0])
    ids = torch.empty_like(position)
    for width in set(widths):
        same = torch.tensor([row for row, its in enumerate(widths) if its == width])
        ids[same] = sample(logits[same], history[same], rows[same], position[same], width)
    return ids


def sample(logits: Tensor, history: Tensor, rows: SamplingRows, position: Tensor, width: int) -> Tensor:
    """The next id of each row: the likeliest where its temperature is 0, else drawn by its seed and position.

    logits (rows, vocab) float32; history (rows, length) int64; position (rows,) int64, that of the next id.
    Returns (rows,) int64, NOT_A_NUMBER where there is nothing to choose from. It draws by the Gumbel-max trick
    (Maddison et al., 2014): which token wins hardly depends on the last bits of the logits, which differ with the
    number of rows that are computed together.
    """
    logits = penalize(logits, history, rows.repetition_penalty)
    largest, likeliest = logits.max(-1)
    chosen = likeliest
    if width:
        ids, probabilities = nucleus(logits, rows, width)
        winner = (probabilities.log() + gumbel(rows.seed, position, ids)).argmax(-1, keepdim=True)
        chosen = torch.where(rows.temperature == 0, likeliest, ids.gather(1, winner)[:, 0])
    # a NaN is the largest of any, and no comparison with one is true
    return torch.where(largest.abs() < torch.inf, chosen, NOT_A_NUMBER)
