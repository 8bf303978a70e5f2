"""Attention for the CPU, batch-invariant: a query's bits depend on the keys that it sees, and on nothing else.

It replaces torch's scaled_dot_product_attention in the passes that ask for it (forward.Pass.tile).
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llm.devices import forward
from llm.weights.settings import set_for_libraries

TILE = 64
"""Queries of a prompt that are computed together."""
MULTIPLES = (8, 32)
"""What a tile is padded to a multiple of: the first for which the processor proves to be batch-invariant."""
LENGTH_STEP = 64
"""A tile, and a decode pass, read a multiple of so many keys: for other numbers MKL sums in other orders."""
BLOCK = 128
"""Values that a tile sums at once in float32: MKL splits longer sums at places that depend on their length."""


def in_steps(length: int) -> int:
    """The next multiple of LENGTH_STEP."""
    return -(-length // LENGTH_STEP) * LENGTH_STEP


@functools.cache
def intercept() -> torch.library.Library:
    """Have the attention of passes that ask for it computed by `attend`; all other attention stays torch's."""

    def route(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        pass_ = forward.current()
        if pass_ is None or pass_.tile is None:
            return _torchs_attention(query, key, value, attn_mask, *args, **kwargs)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = _additive(attn_mask, query.dtype, pass_)
        kwargs["tile"] = pass_.tile if pass_.tokens else None
        return attend(query, key, value, attn_mask, *args, **kwargs)

    # transformers would copy the keys and values of grouped queries for each query: `attend` reads them as they are
    set_for_libraries("TRANSFORMERS_SDPA_FORCE_GQA", "1")
    library = torch.library.Library("aten", "IMPL")
    library.impl("scaled_dot_product_attention", route, "CPU")
    return library  # the cache keeps it: when it goes, so does its kernel


def _torchs_attention(*args: Any, **kwargs: Any) -> Tensor:
    """What scaled_dot_product_attention does where nobody intercepts it."""
    result: Tensor = torch.ops.aten.scaled_dot_product_attention.default.decompose(*args, **kwargs)
    return result


def _additive(mask: Tensor, dtype: torch.dtype, pass_: forward.Pass) -> Tensor:
    """0 where a boolean mask is true, minus infinity elsewhere; computed once in a pass."""
    key = (mask.data_ptr(), *mask.shape, *mask.stride())
    if key not in pass_.additive_masks:
        # the boolean one is remembered too, so that its place in memory stays its own
        pass_.additive_masks[key] = mask, torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)
    return pass_.additive_masks[key][1]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    tile: int | None = None,
) -> Tensor:
    """scaled_dot_product_attention for the CPU.

    The bits of torch's kernel depend on where a pass begins and ends, for it takes queries and keys in blocks; and for
    few queries it takes 5 to 8 times as long as two batched products over contiguous keys and values.
    query (rows, heads, queries, head size); key, value (rows, heads, length, head size); attn_mask additive;
    tile: of a prefill pass, whose last key is the last query's own: what its tiles are padded to a multiple of.
    """
    queries, length = query.shape[-2], key.shape[-2]
    if is_causal:
        attn_mask = query.new_full((queries, length), -torch.inf).triu_(1)
    scale = scale or query.shape[-1] ** -0.5
    if tile is not None:
        assert attn_mask is not None
        return _in_tiles(query, key, value, attn_mask, scale, tile)
    heads = query.shape[1]
    if enable_gqa:
        assert queries == 1
        # the heads that read the same keys become queries of one head
        query = query.reshape(len(query), key.shape[1], -1, query.shape[-1])
        if attn_mask is not None and attn_mask.dim() == 4 and attn_mask.shape[1] > 1:
            attn_mask = attn_mask.reshape(len(attn_mask), key.shape[1], -1, length)
    result = _weighted(query, key, value, attn_mask, scale, block=length)
    return result.reshape(len(query), heads, queries, -1)


def _in_tiles(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, tile: int) -> Tensor:
    """The rows one after another: what one of them reads stays in the processor's cache."""
    (rows, heads, queries, _), (_, groups, length, _) = query.shape, key.shape
    result = query.new_empty(rows, heads, queries, value.shape[-1])
    # Scores in float32, as torch's kernel has them: so many queries pay for it. Where rows lie elsewhere in memory, MKL
    # sums in other orders: what is multiplied is contiguous, and ends at a whole step.
    padded = in_steps(length)
    keys = key.new_empty(heads, padded, key.shape[-1], dtype=torch.float32)
    values = value.new_empty(heads, padded, value.shape[-1])
    for ours in (keys, values):
        ours[:, length:] = 0
    mask = F.pad(mask, (0, padded - length), value=-torch.inf)
    mask = mask.expand(rows, *(mask.shape[1:] if mask.dim() == 4 else (1, queries, padded)))
    # a sum of bfloat16 in parts would be rounded at each
    block = BLOCK if value.dtype == torch.float32 else padded
    for row in range(rows):
        for ours, its in ((keys, key[row]), (values, value[row])):
            ours.unflatten(0, (groups, -1))[:, :, :length] = its[:, None]
        for first in range(0, queries, TILE):
            part = query[row, :, first : first + TILE].float().contiguous()
            size = part.shape[1]
            seen = in_steps(length - queries + first + size)
            sees = mask[row, :, first : first + size, :seen]
            if missing := -size % tile:
                part, sees = F.pad(part, (0, 0, 0, missing)), F.pad(sees, (0, 0, 0, missing))
            part = _weighted(part, keys[:, :seen], values[:, :seen], sees, scale, block)
            result[row, :, first : first + size] = part[:, :size]
    return result


def _weighted(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, block: int) -> Tensor:
    """block: how many values are summed at once."""
    scores = (query @ key.transpose(-1, -2)).float()
    scores = scores * scale if mask is None else torch.add(mask, scores, alpha=scale, out=scores)
    weights = F.softmax(scores, -1).to(value.dtype)
    result = weights[..., :block] @ value[..., :block, :]
    for first in range(block, value.shape[-2], block):
        result += weights[..., first : first + block] @ value[..., first : first + block, :]
    return result


@dataclass(frozen=True)
class Heads:
    """The heads of an attention."""

    number: int
    group: int
    """How many read the same keys: in a decode pass transformers makes them queries of one head."""
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
    shape = (3, 1, heads.number, most, heads.size)
    query, key, value = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(heads.dtype)
    sees = torch.full((most, most), -torch.inf, dtype=heads.dtype).triu_(1)

    def bits(queries: range, mask: Tensor, length: int, rows: int, tile: int | None) -> Tensor:
        cut = query[:, :, queries.start : queries.stop], key[:, :, :length], value[:, :, :length]
        # contiguous, as what the cache gives
        q, k, v = (x.expand(rows, -1, -1, -1).contiguous() for x in cut)
        return attend(q, k, v, mask[:, :length], tile=tile)

    def prefill(first: int, end: int, rows: int) -> Tensor:
        return bits(range(first, end), sees[first:end], end, rows, tile)

    def decode(queries: int, length: int, rows: int) -> Tensor:
        return bits(range(queries), sees[40:41], length, rows, None)

    now, groups = torch.get_num_threads(), {1, heads.group}
    torch.set_num_threads(threads)
    whole = prefill(0, most, 1)
    alone = {queries: decode(queries, LENGTH_STEP, 1) for queries in groups}
    torch.set_num_threads(now)
    cuts = [(0, 2, 1), (0, 5, 1), (0, 11, 4), (3, 17, 1), (0, 45, 3), (5, 133, 2), (160, 240, 1), (500, most, 3)]
    checks = [(prefill(first, end, rows) == whole[:, :, first:end]).all() for first, end, rows in cuts]
    for queries in groups:
        for length, rows in [(2 * LENGTH_STEP, 3), (most, 4)]:
            checks.append((decode(queries, length, rows) == alone[queries]).all())
    return all(map(bool, checks))
