"""Attention for the CPU, batch-invariant: a query's bits depend on the keys that it sees, and on nothing else.

It replaces torch's scaled_dot_product_attention in the passes that ask for it (forward.Pass.tile). On a GPU the kernels
of a ragged pass take its place in the same way.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llm.devices import forward, processor
from llm.weights.settings import set_for_libraries

TILE = 64
"""Queries of a prompt that are computed together."""
MULTIPLES = (8, 32)
"""What a tile is padded to a multiple of: the first for which the processor proves to be batch-invariant."""
LENGTH_STEP = 64
"""A tile, and a decode pass, read a multiple of so many keys: for other numbers MKL sums in other orders."""
BLOCK = 128
"""Values that are summed at once in float32: MKL splits longer sums at places that depend on their length."""


def in_steps(length: int) -> int:
    """The next multiple of LENGTH_STEP."""
    return -(-length // LENGTH_STEP) * LENGTH_STEP


@functools.cache
def intercept(device: str) -> torch.library.Library:
    """Have the attention of passes that ask for it computed by `attend`, or by a ragged pass' kernels; all other
    attention stays torch's. device: its type, "cpu" or "cuda"."""

    def route(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        pass_ = forward.current()
        if pass_ and pass_.ragged:
            # a boolean mask says which keys a token sees, as its position does
            bias = attn_mask if attn_mask is not None and attn_mask.is_floating_point() else None
            return pass_.ragged.attend(query, key, value, bias, kwargs.get("scale") or query.shape[-1] ** -0.5)
        if pass_ is None or pass_.tile is None:
            return _torchs_attention(query, key, value, attn_mask, *args, **kwargs)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = additive(attn_mask, query.dtype, pass_)
        kwargs["prefill"] = pass_ if pass_.tokens else None
        if pass_.padding:
            query, attn_mask = query[: len(key)], None if attn_mask is None else attn_mask[: len(key)]
        return pass_.with_padding(attend(query, key, value, attn_mask, *args, **kwargs))

    library = torch.library.Library("aten", "IMPL")
    library.impl("scaled_dot_product_attention", route, device.upper())
    return library  # the cache keeps it: when it goes, so does its kernel


def read_grouped_as_they_are(yes: bool) -> None:
    """Whether transformers hands on the keys and values of grouped queries as they are, for what replaces torch's
    attention. Otherwise it copies them for each query, for torch has no fast kernel for them with a mask."""
    set_for_libraries("TRANSFORMERS_SDPA_FORCE_GQA", "1" if yes else "0")


def _torchs_attention(*args: Any, **kwargs: Any) -> Tensor:
    """What scaled_dot_product_attention does where nobody intercepts it."""
    result: Tensor = torch.ops.aten.scaled_dot_product_attention.default.decompose(*args, **kwargs)
    return result


def additive(mask: Tensor, dtype: torch.dtype, pass_: forward.Pass) -> Tensor:
    """0 where a boolean mask is true, minus infinity elsewhere; computed once in a pass."""
    key = ("mask", mask.data_ptr(), *mask.shape, *mask.stride())
    if key not in pass_.memo:
        # the boolean one is remembered too, so that its place in memory stays its own
        pass_.memo[key] = mask, torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)
    result: Tensor = pass_.memo[key][1]
    return result


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    prefill: forward.Pass | None = None,
) -> Tensor:
    """scaled_dot_product_attention for the CPU.

    The bits of torch's kernel depend on where a pass begins and ends, for it takes queries and keys in blocks; and for
    few queries it takes 5 to 8 times as long as two batched products over contiguous keys and values.
    query (rows, heads, queries, head size); key, value (rows, heads, length, head size); attn_mask additive;
    prefill: the pass, if it reads prompts.
    """
    queries, length = query.shape[-2], key.shape[-2]
    if is_causal:
        attn_mask = query.new_full((queries, length), -torch.inf).triu_(1)
    scale = scale or query.shape[-1] ** -0.5
    if prefill:
        assert attn_mask is not None
        return _in_tiles(query, key, value, attn_mask, scale, prefill)
    if processor.runs_kernels():
        from llm.devices import decode_attention  # imports llvmlite, which is there for Linux on x86 alone

        if attn_mask is not None and decode_attention.fits(query):
            return decode_attention.attend(query, key, value, attn_mask, scale)
    return _weighted(query, key, value, attn_mask, scale)


def _in_tiles(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, pass_: forward.Pass) -> Tensor:
    """The rows one after another: what one of them reads stays in the processor's cache."""
    (rows, heads, queries, _), (_, groups, length, _) = query.shape, key.shape
    result = query.new_zeros(rows, heads, queries, value.shape[-1])
    # Scores in float32, as torch's kernel has them: so many queries pay for it. Where rows lie elsewhere in memory, MKL
    # sums in other orders: what is multiplied is contiguous, and ends at a whole step.
    padded = in_steps(length)
    keys = key.new_empty(groups, padded, key.shape[-1], dtype=torch.float32)
    values = value.new_empty(groups, padded, value.shape[-1])
    mask = F.pad(mask, (0, padded - length), value=-torch.inf)
    mask = mask.expand(rows, *(mask.shape[1:] if mask.dim() == 4 else (1, queries, padded)))
    assert pass_.tile
    for row, (start, count) in enumerate(zip(pass_.starts, pass_.counts, strict=True)):
        end, held = start + count, pass_.shared if row else 0
        for ours, its in ((keys, key[row]), (values, value[row])):
            ours[:, held:end] = its[:, held:end]
            ours[:, end : in_steps(end)] = 0
        for first in range(0, count, TILE):
            part = query[row, :, first : min(count, first + TILE)].float().contiguous()
            size = part.shape[1]
            seen = in_steps(start + first + size)
            if start == pass_.start:
                sees = mask[row, :, first : first + size, :seen]
            else:
                # The model made its mask for the row that starts last. What it adds for a key is the same for all
                # queries that see the key, or the trial says that the model cannot mix starts.
                hidden = mask.new_full((size, seen), -torch.inf).triu_(1 + start + first)
                sees = mask[row, :, -1:, :seen] + hidden
            if missing := -size % pass_.tile:
                part, sees = F.pad(part, (0, 0, 0, missing)), F.pad(sees, (0, 0, 0, missing))
            part = _weighted(part, keys[:, :seen], values[:, :seen], sees, scale)
            result[row, :, first : first + size] = part[:, :size]
    return result


def _weighted(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    keys, values = (x.reshape(-1, *x.shape[-2:]) for x in (key, value))
    # the heads that read the same keys as one head with more queries
    scores = torch.bmm(query.reshape(len(keys), -1, query.shape[-1]), keys.mT).float().view(*query.shape[:-1], -1)
    scores = scores * scale if mask is None else torch.add(mask, scores, alpha=scale, out=scores)
    weights = F.softmax(scores, -1).to(value.dtype).view(len(values), -1, values.shape[1])
    # a sum of bfloat16 in parts would be rounded at each
    block = BLOCK if value.dtype == torch.float32 else values.shape[1]
    result = torch.bmm(weights[..., :block], values[:, :block])
    for first in range(block, values.shape[1], block):
        torch.baddbmm(result, weights[..., first : first + block], values[:, first : first + block], out=result)
    return result.view(*query.shape[:-1], -1)


@dataclass(frozen=True)
class Heads:
    """The heads of an attention."""

    number: int
    group: int
    """How many read the same keys."""
    size: int
    dtype: torch.dtype


def batch_invariant_tile(heads: Heads) -> int | None:
    """The first of MULTIPLES for which a query has the same bits however its prompt is cut into chunks, however far
    the cache reaches, and beside any other rows. None where none is."""
    for tile in MULTIPLES:
        if agrees(tile, heads, torch.get_num_threads()):
            return tile
    return None


def agrees(tile: int, heads: Heads, threads: int) -> bool:
    """Whether a query has the same bits in several passes of this number of threads as in one pass of `threads`."""
    most = 576
    positions = 40, 263, 400
    shape = (3, 1, heads.number, most, heads.size)
    query, key, value = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(heads.dtype)
    key, value = key[:, :: heads.group], value[:, :: heads.group]
    sees = torch.full((most, most), -torch.inf, dtype=heads.dtype).triu_(1)

    def attended(rows: int, length: int, queries: Tensor, mask: Tensor, prefill: forward.Pass | None) -> Tensor:
        # contiguous, as what the cache gives
        k, v = (x[:, :, :length].expand(rows, -1, -1, -1).contiguous() for x in (key, value))
        return attend(queries.contiguous(), k, v, mask[:, :length], prefill=prefill)

    def prefill(*chunks: tuple[int, int]) -> list[Tensor]:
        """Queries from one to another, for each row of a pass. Returns (heads, queries, head size) for each."""
        start, width = max(first for first, _ in chunks), max(end - first for first, end in chunks)
        starts, counts = zip(*((first, end - first) for first, end in chunks), strict=True)
        pass_ = forward.Pass(start + width, start, slice(0), starts=starts, counts=counts, tokens=1, tile=tile)
        queries = torch.cat([query[:, :, first : first + width] for first in starts])
        result = attended(len(chunks), start + width, queries, sees[start : start + width], pass_)
        return [row[:, :count] for row, count in zip(result, counts, strict=True)]

    def decode(position: int, length: int, rows: int) -> Tensor:
        return attended(rows, length, query[:, :, :1].expand(rows, -1, -1, -1), sees[position : position + 1], None)

    now = torch.get_num_threads()
    torch.set_num_threads(threads)
    (whole,), decoded = prefill((0, most)), [decode(position, in_steps(position + 1), 1) for position in positions]
    torch.set_num_threads(now)
    passes = [[(0, 2)], [(0, 5)], 4 * [(0, 11)], [(3, 17)], 3 * [(0, 45)], 2 * [(5, 133)], [(160, 240)]]
    passes += [3 * [(500, most)], [(5, 45), (160, 240), (0, 2)]]
    checks = [
        (row == whole[:, first:end]).all()
        for chunks in passes
        for row, (first, end) in zip(prefill(*chunks), chunks, strict=True)
    ]
    checks += [
        (decode(position, length, rows) == result).all()
        for position, result in zip(positions, decoded, strict=True)
        for length, rows in [(in_steps(position + 1) + LENGTH_STEP, 3), (most, 4)]
    ]
    return all(map(bool, checks))
