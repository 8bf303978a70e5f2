"""Triton kernels for an NVIDIA GPU: a decode step is many small operations, and each kernel of one costs its launch.

A kernel's tiles and the order of its sums depend on the model's shapes alone: never on how many rows are computed
together, nor on timings, as tuning at start would. So where a kernel is used, a row has the same bits in any company.

Whether a kernel is right and fast on this card, and so whether it is used, is asked at start: see kernel_check.py.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Attention

SPLIT = 256
"""Keys that one program of a decode step reads. It begins at a multiple of this, so that the order in which a token's
keys are summed depends on the token's position alone."""
KEY_BLOCK = 64
"""Keys that a program multiplies at once."""
FEWEST_QUERIES = 16
"""Of a matrix product on a tensor core."""
MOST_QUERIES = 32
"""Of one program. From 64 on Triton gives a Hopper's wgmma instructions several products at once, and programs that
have those are known to read outside of their memory, or wrong numbers (triton#10486, #10573, #11366; 3.6 and 3.7)."""


@triton.jit
def _write(
    keys, values, cached_keys, cached_values, rows, positions,
    keys_head, keys_token, values_head, values_token, cache_row, cache_head, cache_token,
    SIZE: tl.constexpr, SIZE_PADDED: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0), tl.program_id(1)
    position = tl.load(positions + token)
    if position >= 0:
        number = tl.arange(0, SIZE_PADDED)
        inside = number < SIZE
        place = tl.load(rows + token) * cache_row + head * cache_head + position * cache_token
        key = tl.load(keys + head * keys_head + token * keys_token + number, mask=inside)
        tl.store(cached_keys + place + number, key, mask=inside)
        value = tl.load(values + head * values_head + token * values_token + number, mask=inside)
        tl.store(cached_values + place + number, value, mask=inside)


# a mask is as long as the context and the pass together: not one kernel for each length
@triton.jit(do_not_specialize=["bias_head", "bias_token"])
def _attend(
    queries, keys, values, bias, rows, positions, output, sums, largest, scale,
    query_head, query_token, cache_row, cache_head, cache_token, bias_head, bias_token, output_head, output_token,
    HAS_BIAS: tl.constexpr, GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr, SIZE: tl.constexpr,
    SIZE_PADDED: tl.constexpr, TOKENS: tl.constexpr, MEMBERS: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens of one row, with the GROUP heads that read the same keys, against the keys of one split: MEMBERS
    queries with padding. With SPLIT 0 all keys are one split, and the output is the attention itself; otherwise the
    weighted sum of the split, with `sums` and `largest` for _join."""
    first_token, group, split = tl.program_id(0) * TOKENS, tl.program_id(1), tl.program_id(2)
    member = tl.arange(0, MEMBERS)
    token = first_token + member // GROUP_PADDED
    in_group = member % GROUP_PADDED
    head = group * GROUP + in_group
    is_query = (in_group < GROUP) & (member // GROUP_PADDED < TOKENS)
    position = tl.load(positions + token, mask=is_query, other=-1).to(tl.int32)
    number = tl.arange(0, SIZE_PADDED)
    query_at = queries + token[:, None] * query_token + head[:, None] * query_head + number[None, :]
    query = tl.load(query_at, mask=is_query[:, None] & (number < SIZE)[None, :], other=0.0)
    cache_at = tl.load(rows + first_token) * cache_row + group * cache_head

    end = tl.max(position) + 1
    start = 0
    if SPLIT:
        start = split * SPLIT
        end = tl.minimum(end, start + SPLIT)
    high = tl.full([MEMBERS], -float("inf"), tl.float32)
    total = tl.zeros([MEMBERS], tl.float32)
    weighted = tl.zeros([MEMBERS, SIZE_PADDED], tl.float32)
    for first in range(start, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        place = cache_at + at.to(tl.int64)[:, None] * cache_token + number[None, :]
        inside = (at < end)[:, None] & (number < SIZE)[None, :]
        key = tl.load(keys + place, mask=inside, other=0.0)
        scores = tl.dot(query, tl.trans(key)) * scale
        sees = is_query[:, None] & (at[None, :] <= position[:, None])
        if HAS_BIAS:
            bias_at = bias + head[:, None] * bias_head + token[:, None] * bias_token + at[None, :]
            scores += tl.load(bias_at, mask=sees, other=0.0).to(tl.float32)
        scores = tl.where(sees, scores, -float("inf"))
        higher = tl.maximum(high, tl.max(scores, 1))
        # a query that has seen no key yet: minus infinity less itself is no number
        base = tl.where(higher == -float("inf"), 0.0, higher)
        weights = tl.exp(scores - base[:, None])
        shrink = tl.exp(high - base)
        value = tl.load(values + place, mask=inside, other=0.0)
        weighted = weighted * shrink[:, None] + tl.dot(weights.to(value.dtype), value)
        total = total * shrink + tl.sum(weights, 1)
        high = higher

    is_number = is_query[:, None] & (number < SIZE)[None, :]
    if SPLIT:
        place = (token * tl.num_programs(1) * GROUP + head) * tl.num_programs(2) + split
        # a split beyond the position is never read: of a long context that has few tokens, nearly all are
        is_read = start < end
        tl.store(output + place[:, None] * SIZE + number[None, :], weighted, mask=is_number & is_read)
        tl.store(sums + place, total, mask=is_query & is_read)
        tl.store(largest + place, high, mask=is_query & is_read)
    else:
        # padding has seen no key
        attended = weighted / tl.where(total == 0.0, 1.0, total)[:, None]
        output_at = output + token[:, None] * output_token + head[:, None] * output_head + number[None, :]
        tl.store(output_at, attended.to(output.dtype.element_ty), mask=is_number)


@triton.jit
def _join(
    weighted, sums, largest, positions, output, output_head, output_token,
    SIZE: tl.constexpr, SIZE_PADDED: tl.constexpr, SPLITS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """The attention of one token and head from the weighted sums of its splits, in their order."""
    token, head = tl.program_id(0), tl.program_id(1)
    first = (token * tl.num_programs(1) + head) * SPLITS
    number = tl.arange(0, SIZE_PADDED)
    splits = (tl.load(positions + token).to(tl.int32) + SPLIT) // SPLIT
    high = -float("inf")
    total = 0.0
    result = tl.zeros([SIZE_PADDED], tl.float32)
    for split in range(0, splits):
        its_high = tl.load(largest + first + split)
        higher = tl.maximum(high, its_high)
        part = tl.load(weighted + (first + split) * SIZE + number, mask=number < SIZE, other=0.0)
        result = result * tl.exp(high - higher) + part * tl.exp(its_high - higher)
        total = total * tl.exp(high - higher) + tl.load(sums + first + split) * tl.exp(its_high - higher)
        high = higher
    result = result / tl.where(total == 0.0, 1.0, total)
    output_at = output + token * output_token + head * output_head + number
    tl.store(output_at, result.to(output.dtype.element_ty), mask=number < SIZE)


@dataclass
class RaggedTokens:
    """The tokens of a pass, of any rows in any order: those that decode, or those of several prompts."""

    rows: Tensor
    """(tokens,) int64: each one's row of the cache."""
    positions: Tensor
    """(tokens,) int64: each one's position there, -1 for padding."""
    block: int
    """So many tokens in line are of one row: 1 where each may be of another."""

    def write(self, keys: Tensor, values: Tensor, cached_keys: Tensor, cached_values: Tensor) -> None:
        """Write each token's key and value at its row and position; nothing for padding.

        keys, values (1, heads, tokens, head size); cached (rows, heads, capacity, head size), both laid out alike.
        """
        _, heads, count, size = keys.shape
        assert keys.stride(3) == values.stride(3) == 1 and cached_keys.stride() == cached_values.stride()
        _write[(count, heads)](
            keys, values, cached_keys, cached_values, self.rows, self.positions,
            keys.stride(1), keys.stride(2), values.stride(1), values.stride(2), *cached_keys.stride()[:3],
            SIZE=size, SIZE_PADDED=triton.next_power_of_2(size), num_warps=1,
        )  # fmt: skip

    def attend(
        self, query: Tensor, cached_keys: Tensor, cached_values: Tensor, bias: Tensor | None, scale: float
    ) -> Tensor:
        """Attention of each token to the keys of its row, up to its position; zeros for padding.

        query (1, heads, tokens, head size) in float16 or bfloat16; cached (rows, key heads, capacity, head size); bias
        broadcast to (1, heads, tokens, at least capacity), added to the scores, or None. Sums in float32. Returns
        (1, heads, tokens, head size), each token's heads side by side. A decode step's keys are split among programs
        as in Flash-Decoding (Dao et al., 2023).
        """
        _, heads, count, size = query.shape
        key_heads, capacity = cached_keys.shape[1:3]
        assert query.stride(3) == cached_keys.stride(3) == 1 and cached_keys.stride() == cached_values.stride()
        group = heads // key_heads
        group_padded = triton.next_power_of_2(group)
        tokens = max(1, min(self.block, MOST_QUERIES // group_padded))
        output = query.new_empty(1, count, heads, size).transpose(1, 2)
        # the tokens of a prompt are enough programs without
        splits = 1 if self.block > 1 else triton.cdiv(capacity, SPLIT)
        sums = largest = partial = output
        if splits > 1:
            partial = query.new_empty(count, heads, splits, size, dtype=torch.float32)
            sums, largest = query.new_empty(2, count, heads, splits, dtype=torch.float32)
        bias_strides: tuple[int, ...] = (0, 0)
        if bias is not None:
            bias = bias.expand(1, heads, count, -1)
            assert bias.stride(3) == 1
            bias_strides = bias.stride()[1:3]
        _attend[(count // tokens, key_heads, splits)](
            query, cached_keys, cached_values, query if bias is None else bias, self.rows, self.positions,
            partial, sums, largest, scale,
            *query.stride()[1:3], *cached_keys.stride()[:3], *bias_strides, *output.stride()[1:3],
            HAS_BIAS=bias is not None, GROUP=group, GROUP_PADDED=group_padded, SIZE=size,
            SIZE_PADDED=max(16, triton.next_power_of_2(size)), TOKENS=tokens,
            MEMBERS=max(FEWEST_QUERIES, tokens * group_padded), SPLIT=SPLIT if splits > 1 else 0,
            BLOCK=KEY_BLOCK, num_warps=4, num_stages=2,
        )  # fmt: skip
        if splits > 1:
            _join[(count, heads)](
                partial, sums, largest, self.positions, output, *output.stride()[1:3],
                SIZE=size, SIZE_PADDED=triton.next_power_of_2(size), SPLITS=splits, SPLIT=SPLIT, num_warps=1,
            )  # fmt: skip
        return output


# Norms


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, subtracts_mean: bool) -> Tensor:
    """LayerNorm, or RMSNorm where it does not subtract the mean, of each token.

    x (..., width) of 16 bits, contiguous; weight, bias (width,) of the same dtype. Returns the same shape and dtype.
    Statistics are in float32. LayerNorm rounds once, at the end, as torch does; RMSNorm also before the weight, as
    transformers' LlamaRMSNorm does.
    """
    width = x.shape[-1]
    tokens = x.numel() // width
    result = torch.empty_like(x)
    if tokens:
        block = triton.next_power_of_2(width)
        _norm[(tokens,)](
            x,
            weight,
            weight if bias is None else bias,
            result,
            eps,
            WIDTH=width,
            BLOCK=block,
            SUBTRACTS_MEAN=subtracts_mean,
            HAS_BIAS=bias is not None,
            # some 16 elements a thread: a token is one read from memory, for which all threads wait together
            num_warps=min(max(block // 512, 1), 16),
        )
    return result


@triton.jit
def _norm(
    x,
    weight,
    bias,
    result,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SUBTRACTS_MEAN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """One program a token, all of it in registers."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    values = tl.load(x + token * WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    if SUBTRACTS_MEAN:
        values = tl.where(inside, values - tl.sum(values) / WIDTH, 0.0)
    normalized = values * tl.rsqrt(tl.sum(values * values) / WIDTH + eps)
    if not SUBTRACTS_MEAN:
        normalized = normalized.to(result.dtype.element_ty).to(tl.float32)
    output = normalized * scale
    if HAS_BIAS:
        output += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(result + token * WIDTH + columns, output.to(result.dtype.element_ty), mask=inside)


# Linear layers of few tokens

MOST_TOKENS = 32
"""More are for cuBLAS: `linear` reads all inputs again for each block of outputs."""


class _Tile(NamedTuple):
    """What a program of `linear` computes, and how."""

    outs: int
    parts: int
    """Of a step, each a warp's."""
    part_in: int
    """In features of a part. As many as leave each thread several rows to read: else Triton (3.6 and 3.7) lays a tile
    out so that a warp reads its rows from the same banks of shared memory."""
    steps_ahead: tuple[int, int]
    """How many steps are read ahead, for up to 16 tokens and for more. With inputs they take 96 KiB of shared memory
    at the most, of the 99 that a consumer GPU has."""


def _tile(out_features: int) -> _Tile:
    """The tile for a weight, whatever the number of tokens.

    As many outputs as leave nearly each of an H100's 132 processors a program: each program reads all inputs, from the
    cache through which the weights come too. All programs together then read 3 MB and more ahead, about what 3 to 5
    TB/s deliver within the latency of the memory.
    """
    if out_features < 4096:
        return _Tile(outs=16, parts=4, part_in=128, steps_ahead=(3, 2))
    if out_features < 8192:
        return _Tile(outs=32, parts=2, part_in=64, steps_ahead=(4, 4))
    return _Tile(outs=64, parts=2, part_in=64, steps_ahead=(4, 4))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product of a linear layer, as fast as the GPU reads the weights.

    x (..., in features), of 1 to MOST_TOKENS tokens; weight (out features, in features); bias (out features,). All
    contiguous, of the same 16 bits. Returns (..., out features), summed in float32 and rounded once. A token's bits
    are the same whatever the number of the others and wherever it is among them.
    """
    out_features, in_features = weight.shape
    tokens = x.numel() // in_features
    if not 1 <= tokens <= MOST_TOKENS:
        raise ValueError(f"{tokens} tokens: the kernel computes 1 to {MOST_TOKENS}")
    result = x.new_empty(*x.shape[:-1], out_features)
    tile = _tile(out_features)
    few = tokens <= 16
    _linear[(triton.cdiv(out_features, tile.outs),)](
        x,
        weight,
        weight if bias is None else bias,
        result,
        tokens,
        in_features,
        out_features,
        HAS_BIAS=bias is not None,
        TOKENS=16 if few else 32,
        BLOCK_OUT=tile.outs,
        PARTS=tile.parts,
        PART_IN=tile.part_in,
        num_warps=tile.parts,
        # Triton counts the step that it computes too
        num_stages=1 + tile.steps_ahead[not few],
    )
    return result


# one kernel for all numbers of tokens: also for one, of which Triton would make a constant
@triton.jit(do_not_specialize=["tokens"])
def _linear(
    x,
    weight,
    bias,
    result,
    tokens,
    in_features,
    out_features,
    HAS_BIAS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    PARTS: tl.constexpr,
    PART_IN: tl.constexpr,
):
    """One program a block of outputs, for all tokens.

    A step reads PARTS times PART_IN in features. Its products have three dimensions, the first of them that of parts:
    Triton gives each warp one, so that each sums its own part of the in features. Else all warps would compute one sum
    over all in features, each instruction of which needs the result of the one before, and where there are few
    programs that takes longer than to read the weights.
    """
    rows = tl.arange(0, TOKENS)
    outs = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    ins = tl.arange(0, PARTS)[:, None] * PART_IN + tl.arange(0, PART_IN)[None, :]
    # (PARTS, TOKENS, PART_IN) and (PARTS, PART_IN, BLOCK_OUT)
    inputs = x + rows[None, :, None] * in_features + ins[:, None, :]
    weights = weight + outs.to(tl.int64)[None, None, :] * in_features + ins[:, :, None]
    is_token = (rows < tokens)[None, :, None]
    is_out = (outs < out_features)[None, None, :]
    sums = tl.zeros((PARTS, TOKENS, BLOCK_OUT), tl.float32)
    for start in range(0, in_features, PARTS * PART_IN):
        is_in = start + ins < in_features
        some_inputs = tl.load(inputs + start, mask=is_token & is_in[:, None, :], other=0.0)
        some_weights = tl.load(weights + start, mask=is_in[:, :, None] & is_out, other=0.0)
        sums = tl.dot(some_inputs, some_weights, sums)
    output = _sum_of_parts(sums, PARTS)
    if HAS_BIAS:
        output += tl.load(bias + outs, mask=outs < out_features, other=0.0).to(tl.float32)[None, :]
    tl.store(
        result + rows[:, None] * out_features + outs[None, :],
        output.to(result.dtype.element_ty),
        mask=(rows < tokens)[:, None] & (outs < out_features)[None, :],
    )


@triton.jit
def _sum_of_parts(sums, PARTS: tl.constexpr):
    """Of two or four, in an order that is written here: that of tl.sum may depend on the number of tokens."""
    last = tl.permute(sums, (1, 2, 0))
    if PARTS == 4:
        even, odd = tl.split(tl.reshape(last, (sums.shape[1], sums.shape[2], 2, 2)))
        last = even + odd
    first, second = tl.split(last)
    return first + second


# Linear layers of many tokens, where a token's bits may not depend on their number

TILE_TOKENS, TILE_OUTS, TILE_INS = 64, 128, 64
"""Tokens, outputs and in features of a tile. Four steps over the in features take 96 KiB of shared memory."""


def prefill_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product of a linear layer, for any number of tokens.

    Shapes and dtypes are those of `linear`, and so is the promise: a token's bits are the same whatever the number of
    the others and wherever it is among them. They are not those of `linear`, which may use other instructions.
    """
    out_features, in_features = weight.shape
    tokens = x.numel() // in_features
    result = x.new_empty(*x.shape[:-1], out_features)
    # all tokens of a block of outputs, then those of the next: each weight comes from memory once
    _prefill_linear[(triton.cdiv(tokens, TILE_TOKENS), triton.cdiv(out_features, TILE_OUTS))](
        x,
        weight,
        weight if bias is None else bias,
        result,
        tokens,
        in_features,
        out_features,
        HAS_BIAS=bias is not None,
        TOKENS=TILE_TOKENS,
        OUTS=TILE_OUTS,
        INS=TILE_INS,
        num_warps=4,
        num_stages=4,
    )
    return result


@triton.jit(do_not_specialize=["tokens"])
def _prefill_linear(
    x,
    weight,
    bias,
    result,
    tokens,
    in_features,
    out_features,
    HAS_BIAS: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTS: tl.constexpr,
    INS: tl.constexpr,
):
    """One program a tile: TOKENS tokens and OUTS outputs, INS in features after the other."""
    rows = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    outs = (tl.program_id(1) * OUTS + tl.arange(0, OUTS)).to(tl.int64)
    ins = tl.arange(0, INS)
    # (TOKENS, INS) and (INS, OUTS)
    inputs = x + rows[:, None] * in_features + ins[None, :]
    weights = weight + outs[None, :] * in_features + ins[:, None]
    is_token = (rows < tokens)[:, None]
    is_out = (outs < out_features)[None, :]
    sums = tl.zeros((TOKENS, OUTS), tl.float32)
    for start in range(0, in_features, INS):
        is_in = start + ins < in_features
        some_inputs = tl.load(inputs + start, mask=is_token & is_in[None, :], other=0.0)
        some_weights = tl.load(weights + start, mask=is_in[:, None] & is_out, other=0.0)
        sums = tl.dot(some_inputs, some_weights, sums)
    if HAS_BIAS:
        sums += tl.load(bias + outs, mask=outs < out_features, other=0.0).to(tl.float32)[None, :]
    tl.store(
        result + rows[:, None] * out_features + outs[None, :],
        sums.to(result.dtype.element_ty),
        mask=is_token & is_out,
    )


# The next ids

MOST_SORTED = 128
"""Of the likeliest tokens of a row, by one warp."""
MANY_BLOCK = 1024
"""Of more than these, so many after the other."""
NOT_A_NUMBER = -1
"""That of llm.engine.sampling."""

# what a kernel may read of its module
_NOT_A_NUMBER = tl.constexpr(NOT_A_NUMBER)
_MOST_SORTED = tl.constexpr(MOST_SORTED)
_GAMMA = tl.constexpr(0x9E3779B97F4A7C15)
_FIRST = tl.constexpr(0xBF58476D1CE4E5B9)
_SECOND = tl.constexpr(0x94D049BB133111EB)


def choose(
    logits: Tensor,
    history: Tensor,
    positions: Tensor,
    active: Tensor,
    chosen: Tensor,
    *,
    temperature: Tensor,
    top_p: Tensor,
    top_k: Tensor,
    repetition_penalty: Tensor,
    seed: Tensor,
    width: int,
) -> None:
    """The next id of each row into `chosen` and, where it is active, into its history; its position moves there.

    logits (rows, vocabulary) float32; history (rows, context) int64; positions (rows,) int64, those of the rows' last
    ids; active (rows,) bool; chosen (rows,) int64. The others are the fields of SamplingRows, (rows,) each. Chooses
    what llm.engine.sampling.sample chooses at the same width, but for the order of sums over more than MOST_SORTED.

    width: how many of the likeliest tokens are sorted, 0 where all rows are greedy; more than MOST_SORTED only for the
    rows that need them. That function is faster then, but sums in an order that depends on the number of rows.
    """
    penalized = torch.empty_like(logits)
    penalize(logits, history, positions, repetition_penalty, penalized)
    largest, likeliest = penalized.max(-1)
    few = min(width, MOST_SORTED)
    for its_width in sorted({few, width}):
        # the temperature divides after it, and changes no order
        top, ids = penalized.topk(its_width, dim=-1) if its_width else (penalized, likeliest)
        _draw[(len(chosen),)](
            top,
            ids,
            largest,
            likeliest,
            history,
            positions,
            active,
            chosen,
            temperature,
            top_p,
            top_k,
            seed,
            history.stride(0),
            WIDTH=its_width,
            **_draw_options(its_width),
            OF_FEW=its_width == few,
            OF_MANY=its_width == width,
        )


def _draw_options(width: int) -> dict[str, int]:
    if width > MOST_SORTED:
        return {"BLOCK": MANY_BLOCK, "num_warps": 4}
    # a row's 128 numbers are four a thread: to pass sums between warps would take longer
    return {"BLOCK": triton.next_power_of_2(max(width, 1)), "num_warps": 1}


def penalize(logits: Tensor, history: Tensor, positions: Tensor, penalty: Tensor, out: Tensor) -> None:
    """llm.engine.sampling.penalize, into `out`, of a history that is read up to each row's position.

    logits, out (rows, vocabulary) float32, contiguous, two tensors; history (rows, context) int64; positions (rows,)
    int64; penalty (rows,) float32.
    """
    out.copy_(logits)
    rows, context = history.shape
    block = 512
    _penalize[(rows, triton.cdiv(context, block))](
        logits, history, positions, penalty, out, logits.shape[1], history.stride(0), BLOCK=block, num_warps=4
    )


@triton.jit
def _penalize(logits, history, positions, penalty, out, vocabulary, history_stride, BLOCK: tl.constexpr):
    """One program a row and block of its history. An id that is there twice is written twice, the same."""
    row = tl.program_id(0).to(tl.int64)
    last = tl.load(positions + row)
    factor = tl.load(penalty + row)
    start = tl.program_id(1) * BLOCK
    if (start <= last) & (factor != 1):
        columns = start + tl.arange(0, BLOCK)
        known = columns <= last
        ids = tl.load(history + row * history_stride + columns, mask=known, other=0)
        scores = tl.load(logits + row * vocabulary + ids, mask=known, other=0.0)
        # Triton's own division is rounded otherwise than torch's
        scores = tl.where(scores < 0, scores * factor, tl.div_rn(scores, factor))
        tl.store(out + row * vocabulary + ids, scores, mask=known)


@triton.jit
def _draw(
    top,
    ids,
    largest,
    likeliest,
    history,
    positions,
    active,
    chosen,
    temperature,
    top_p,
    top_k,
    seed,
    history_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    OF_FEW: tl.constexpr,
    OF_MANY: tl.constexpr,
):
    """One program a row: `nucleus` and `gumbel` of llm.engine.sampling, and the end of its `sample`.

    top (rows, WIDTH) float32 and ids (rows, WIDTH) int64: the largest logits, from the likeliest down, and where they
    are; not read where WIDTH is 0. largest (rows,) float32, likeliest (rows,) int64: the first of the largest logits.
    OF_FEW, OF_MANY: whether it chooses for rows that need up to MOST_SORTED of them, and for those that need more.
    """
    row = tl.program_id(0).to(tl.int64)
    is_active = tl.load(active + row)
    after = tl.load(positions + row) + is_active.to(tl.int64)
    choice = tl.load(likeliest + row)
    heat = tl.load(temperature + row)
    kept_k = tl.load(top_k + row)
    # see `sampling_width` there
    needs_many = (heat != 0) & ((kept_k == 0) | (2 * kept_k > _MOST_SORTED))
    mine = tl.where(needs_many, OF_MANY, OF_FEW)
    # the widths are known when it is compiled, what each row needs is not
    if WIDTH > _MOST_SORTED:
        if mine & (heat != 0):
            at, p = row * WIDTH, tl.load(top_p + row)
            choice = _drawn_of_many(top + at, ids + at, heat, p, kept_k, tl.load(seed + row), after, WIDTH, BLOCK)
    elif WIDTH > 0:  # noqa: SIM102
        if mine & (heat != 0):
            columns = tl.arange(0, BLOCK)
            inside = columns < WIDTH
            row_ids = tl.load(ids + row * WIDTH + columns, mask=inside, other=0)
            logits = tl.load(top + row * WIDTH + columns, mask=inside, other=-float("inf"))
            # where the division makes a tie with the last of top_k, both are kept
            last = tl.where((kept_k > 0) & (kept_k < WIDTH), kept_k, WIDTH) - 1
            divisor = tl.maximum(heat, 1e-4)
            logits = tl.div_rn(logits, divisor)
            logits = tl.where(logits < tl.div_rn(tl.load(top + row * WIDTH + last), divisor), -float("inf"), logits)
            # of each token and of all that are less likely, summed from the unlikeliest up
            tail = tl.cumsum(_softmax(logits), 0, reverse=True)
            cut = (tail <= 1 - tl.load(top_p + row)) & (columns > 0)
            logits = tl.where(cut, -float("inf"), logits)
            noise = _gumbel(tl.load(seed + row), after, row_ids)
            scores = tl.where(inside, tl.log(_softmax(logits)) + noise, -float("inf"))
            choice = tl.load(ids + row * WIDTH + tl.argmax(scores, 0))
    # a NaN is the largest of any, and no comparison with one is true
    is_number = tl.abs(tl.load(largest + row)) < float("inf")
    tl.store(chosen + row, tl.where(is_number, choice, _NOT_A_NUMBER), mask=mine)
    # NOT_A_NUMBER is for the host to see; the embedding needs an id
    tl.store(history + row * history_stride + after, tl.where(is_number, choice, 0), mask=is_active & mine)
    tl.store(positions + row, after, mask=mine)


@triton.jit
def _drawn_of_many(top, ids, heat, top_p, top_k, seed, position, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The id that a row draws from more tokens than a program sorts at once: as _draw, block after block.

    top (WIDTH,) float32 and ids (WIDTH,) int64, from the likeliest down.
    """
    divisor = tl.maximum(heat, 1e-4)
    high = tl.div_rn(tl.load(top), divisor)
    last = tl.where((top_k > 0) & (top_k < WIDTH), top_k, WIDTH) - 1
    least = tl.div_rn(tl.load(top + last), divisor)
    columns = tl.arange(0, BLOCK)
    total = 0.0
    for start in range(0, WIDTH, BLOCK):
        total += tl.sum(_powers(top, start + columns, divisor, high, least, WIDTH))
    # how many are not cut, from the unlikeliest block up
    kept = 0
    tail = 0.0
    for start in range((WIDTH - 1) // BLOCK * BLOCK, -1, -BLOCK):
        shares = tl.div_rn(_powers(top, start + columns, divisor, high, least, WIDTH), total)
        tails = tail + tl.cumsum(shares, 0, reverse=True)
        kept += tl.sum(((tails > 1 - top_p) & (start + columns < WIDTH)).to(tl.int32))
        tail += tl.sum(shares)
    kept = tl.maximum(kept, 1)
    total = 0.0
    for start in range(0, kept, BLOCK):
        total += tl.sum(_powers(top, start + columns, divisor, high, least, kept))
    best = -float("inf")
    choice = tl.load(ids)
    for start in range(0, kept, BLOCK):
        at = start + columns
        its_ids = tl.load(ids + at, mask=at < kept, other=0)
        shares = tl.div_rn(_powers(top, at, divisor, high, least, kept), total)
        scores = tl.where(at < kept, tl.log(shares) + _gumbel(seed, position, its_ids), -float("inf"))
        score = tl.max(scores)
        winner = tl.load(ids + start + tl.argmax(scores, 0))
        choice = tl.where(score > best, winner, choice)
        best = tl.maximum(best, score)
    return choice


@triton.jit
def _powers(top, at, divisor, high, least, end):
    """The softmax's numerators of the tokens `at` (BLOCK,), 0 from `end` on and below top_k's last."""
    logits = tl.div_rn(tl.load(top + at, mask=at < end, other=-float("inf")), divisor)
    return tl.where((at < end) & (logits >= least), tl.exp(logits - high), 0.0)


@triton.jit
def _softmax(logits):
    """logits (BLOCK,) float32, of which the first is the largest."""
    powers = tl.exp(logits - tl.max(logits))
    return tl.div_rn(powers, tl.sum(powers))


@triton.jit
def _gumbel(seed, position, ids):
    """A number of the standard Gumbel distribution for each id: the same bits of SplitMix64, without a sign.

    seed, position int64; ids (BLOCK,) int64.
    """
    bits = seed.to(tl.uint64, bitcast=True) + position.to(tl.uint64) * _GAMMA + ids.to(tl.uint64)
    bits = (bits ^ (bits >> 30)) * _FIRST
    bits = (bits ^ (bits >> 27)) * _SECOND
    uniform = ((bits >> 41).to(tl.int32).to(tl.float32) + 0.5) * (1 / (1 << 23))
    return -tl.log(-tl.log(uniform))
