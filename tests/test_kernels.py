"""The GPU's kernels, each beside what torch or llm.engine.sampling computes.

Without a GPU Triton interprets them, on tensors of the CPU: see conftest.py. Whether they compile shows there too.
"""

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from llm.engine.sampling import NOT_A_NUMBER, SamplingRows, penalize, sample, sample_each
from llm.engine.sequence import Sampling

pytest.importorskip("triton")

from llm.devices import kernels  # isort: skip

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float16, torch.bfloat16]

no_gpu_nor_interpreter = DEVICE == "cpu" and not hasattr(kernels._norm, "rewrite")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.interpreted,
    pytest.mark.skipif(no_gpu_nor_interpreter, reason="Triton has been imported without its interpreter"),
]


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def rounding(values: Tensor, dtype: torch.dtype) -> Tensor:
    """By how much a number of `dtype` may differ from each value, in float64."""
    distance = torch.finfo(dtype).eps * 2.0 ** values.double().abs().clamp(min=1e-3).log2().floor()
    # the interpreter cuts bfloat16 off
    return distance * (1.01 if DEVICE == "cpu" and dtype == torch.bfloat16 else 0.51)


# Attention

# heads, key heads, head size, capacity, tokens that share a row
SHAPES_OF_ATTENTION = [
    (4, 4, 64, 700, 1),
    (6, 2, 64, 300, 1),
    (4, 1, 80, 600, 1),
    (4, 4, 64, 300, 16),
    (6, 2, 256, 90, 16),
]


def tokens_of(capacity: int, block: int) -> kernels.RaggedTokens:
    """Tokens at both ends of the cache and of a split, or chunks of two prompts; padding."""
    if block == 1:
        places = [(3, capacity - 1), (0, 0), (4, kernels.SPLIT - 1), (1, kernels.SPLIT), (2, -1), (0, 17)]
    else:
        places = (
            [(3, position) for position in range(40, 72)] + [(1, position) for position in range(10)] + [(1, -1)] * 6
        )
    rows, positions = torch.tensor(places, device=DEVICE).T.contiguous()
    return kernels.RaggedTokens(rows, positions, block)


def attended(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, tokens: kernels.RaggedTokens) -> Tensor:
    """Token by token, in float32."""
    result = torch.zeros_like(query, dtype=torch.float32)
    group = query.shape[1] // keys.shape[1]
    for token, (row, position) in enumerate(zip(tokens.rows, tokens.positions, strict=True)):
        if position >= 0:
            seen = slice(int(position) + 1)
            its_keys, its_values = (x[row, :, seen].float().repeat_interleave(group, 0) for x in (keys, values))
            scores = (its_keys @ query[0, :, token, :, None].float())[..., 0] * query.shape[-1] ** -0.5
            if bias is not None:
                scores = scores + bias.expand(1, -1, query.shape[2], -1)[0, :, token, seen].float()
            result[0, :, token] = (scores.softmax(-1)[:, None] @ its_values)[:, 0]
    return result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "key_heads", "size", "capacity", "block"), SHAPES_OF_ATTENTION)
def test_a_token_attends_to_the_keys_of_its_row_up_to_its_position(
    dtype: torch.dtype, heads: int, key_heads: int, size: int, capacity: int, block: int
) -> None:
    tokens = tokens_of(capacity, block)
    count = len(tokens.rows)
    # (1, heads, tokens, head size), each token's heads side by side, as a linear layer gives them
    query = randn(1, count, heads, size, dtype=dtype, seed=1).transpose(1, 2)
    keys, values = (randn(5, key_heads, capacity, size, dtype=dtype, seed=seed) for seed in (2, 3))
    biases = [None, randn(1, heads, 1, capacity + count, dtype=dtype, seed=4)]
    for bias in [*biases, randn(1, heads, count, capacity + count, dtype=dtype, seed=5)]:
        result = tokens.attend(query, keys, values, bias, size**-0.5)
        expected = attended(query, keys, values, bias, tokens)
        assert (result.float() - expected).norm() < expected.norm() * (5e-3 if dtype == torch.bfloat16 else 5e-4)
        assert (result[:, :, tokens.positions < 0] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tokens_attention_has_the_same_bits_in_any_company(dtype: torch.dtype) -> None:
    tokens = tokens_of(700, block=1)
    query = randn(1, 4, 6, 64, dtype=dtype, seed=1)
    keys, values = (randn(5, 4, 700, 64, dtype=dtype, seed=seed) for seed in (2, 3))
    together = tokens.attend(query, keys, values, None, 0.125)
    for token in range(6):
        own = kernels.RaggedTokens(tokens.rows[token : token + 1], tokens.positions[token : token + 1], block=1)
        # in a shorter cache too, where the token fits
        capacity = 700 if tokens.positions[token] >= 300 else 300
        its_keys, its_values = (x[:, :, :capacity].contiguous() for x in (keys, values))
        alone = own.attend(query[:, :, token : token + 1].contiguous(), its_keys, its_values, None, 0.125)
        assert (alone[0, :, 0] == together[0, :, token]).all()


def test_a_split_beyond_the_position_is_neither_written_nor_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a long context that has few tokens, nearly all are."""
    tokens = tokens_of(700, block=1)
    query = randn(1, 4, 6, 64, dtype=torch.float16, seed=1)
    keys, values = (randn(5, 4, 700, 64, dtype=torch.float16, seed=seed) for seed in (2, 3))
    allocated: list[Tensor] = []
    new_empty = torch.Tensor.new_empty

    def not_a_number(like: Tensor, *shape: int, **options: Any) -> Tensor:
        result = new_empty(like, *shape, **options)
        if result.is_floating_point():
            allocated.append(result.fill_(torch.nan))
        return result

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "new_empty", not_a_number)
        assert tokens.attend(query, keys, values, None, 0.125).isfinite().all()
    _, weighted, (sums, largest) = allocated[:3]
    for token, position in enumerate(tokens.positions):
        splits = (position + kernels.SPLIT) // kernels.SPLIT
        for partial in (weighted, sums, largest):
            assert partial[token, :, :splits].isfinite().all() and partial[token, :, splits:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "key_heads"), [(2, 2), (6, 2), (8, 1)])
def test_a_prompts_attention_has_the_same_bits_however_it_is_cut(
    dtype: torch.dtype, heads: int, key_heads: int
) -> None:
    length, block = 100, 16
    queries = randn(1, heads, length, 64, dtype=dtype, seed=1)
    keys, values = (randn(3, key_heads, 200, 64, dtype=dtype, seed=seed) for seed in (2, 3))
    bias = randn(1, heads, 1, 400, dtype=dtype, seed=4)

    def attended(*chunks: tuple[int, int, int]) -> Tensor:
        """Chunks of a row each, from one position to another, in one pass; of the last of them."""
        places = [
            (row, position if position < end else -1)
            for row, start, end in chunks
            for position in range(start, end + -(end - start) % block)
        ]
        rows, positions = torch.tensor(places, device=DEVICE).T.contiguous()
        tokens = kernels.RaggedTokens(rows, positions, block)
        _, start, end = chunks[-1]
        first = len(places) - (end - start) - -(end - start) % block
        return tokens.attend(queries[:, :, positions], keys, values, bias, 0.125)[:, :, first : first + end - start]

    whole = attended((1, 0, length))
    for cuts in ([0, 1, 20, 100], [0, 63, 81, 100]):
        parts = [attended((2, 5, 30), (0, 0, end), (1, start, end)) for start, end in pairwise(cuts)]
        assert torch.equal(torch.cat(parts, 2), whole), cuts


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_and_values_are_written_at_the_place_of_each_token(dtype: torch.dtype) -> None:
    tokens = tokens_of(300, block=16)
    keys, values = (randn(1, 48, 2, 80, dtype=dtype, seed=seed).transpose(1, 2) for seed in (1, 2))
    caches = [randn(5, 2, 300, 80, dtype=dtype, seed=seed) for seed in (3, 4)]
    expected = [cache.clone() for cache in caches]
    tokens.write(keys, values, *caches)
    for cache, written in zip(expected, (keys, values), strict=True):
        for token, (row, position) in enumerate(zip(tokens.rows, tokens.positions, strict=True)):
            if position >= 0:
                cache[row, :, position] = written[0, :, token]
    assert all(map(torch.equal, caches, expected))


# Norms


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (3, 64), (33, 100), (2, 2048), (1, 5000), (1, 16384)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_layer_norm_is_that_of_torch(dtype: torch.dtype, tokens: int, width: int, has_bias: bool) -> None:
    # a mean that is large beside the deviation: squares less the square of the mean would lose it
    x = (randn(tokens, width, seed=1) * 0.5 + 8).to(dtype)
    weight = randn(width, dtype=dtype, seed=2)
    bias = randn(width, dtype=dtype, seed=3) if has_bias else None
    result = kernels.norm(x, weight, bias, 1e-5, subtracts_mean=True)
    exact = F.layer_norm(x.double(), (width,), weight.double(), None if bias is None else bias.double(), 1e-5)
    assert result.dtype == dtype
    assert ((result.double() - exact).abs() <= rounding(exact, dtype) + 1e-5).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (3, 64), (33, 100), (2, 2048), (1, 5000), (1, 16384)])
def test_rms_norm_is_that_of_transformers(dtype: torch.dtype, tokens: int, width: int) -> None:
    module = LlamaRMSNorm(width, 1e-6).to(DEVICE, dtype)
    module.weight = nn.Parameter(randn(width, dtype=dtype, seed=4), requires_grad=False)
    x = randn(1, tokens, width, dtype=dtype, seed=5) * 3
    result, expected = kernels.norm(x, module.weight, None, 1e-6, subtracts_mean=False), module(x)
    assert result.shape == x.shape
    # twice rounded, the first time before the weight
    assert ((result.double() - expected.double()).abs() <= 4 * rounding(expected, dtype)).all()
    if DEVICE == "cuda" or dtype == torch.float16:
        # a statistic that is summed in another order rounds a few normalized values to a neighbour
        assert (result == expected).double().mean() > 0.99


def test_the_norm_of_no_token_is_none() -> None:
    x = randn(0, 8, dtype=torch.float16)
    assert kernels.norm(x, x.new_ones(8), None, 1e-5, subtracts_mean=True).shape == (0, 8)


# Linear layers

# out of a weight that the tile is for; out and in of a smaller one that is computed with it: whole tiles and not, and
# in features that are no whole steps or fewer than one
SHAPES = [(2048, 16, 512), (2048, 50, 700), (6144, 48, 24), (6144, 70, 300), (8192, 130, 130)]


@pytest.fixture(autouse=True)
def interpreted_products(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        from tests.support import interpreter

        interpreter.sum_in_one_order(monkeypatch)


def of_tile(outs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute with the tile of another weight: of few outputs, for the interpreter is slow."""
    tile = kernels._tile(outs)
    monkeypatch.setattr(kernels, "_tile", lambda _: tile)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("of", "outs", "ins"), SHAPES)
@pytest.mark.parametrize("tokens", [1, 7, 32])
def test_a_product_is_that_of_torch(
    dtype: torch.dtype, of: int, outs: int, ins: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_tile(of, monkeypatch)
    x, weight = randn(tokens, ins, dtype=dtype, seed=1), randn(outs, ins, dtype=dtype, seed=2)
    bias = randn(outs, dtype=dtype, seed=3) if tokens > 1 else None
    result = kernels.linear(x, weight, bias)
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert result.dtype == dtype
    assert ((result.double() - exact).abs() <= rounding(exact, dtype) + 1e-6 * math.sqrt(ins)).all()


def test_a_product_keeps_the_dimensions_of_its_inputs() -> None:
    x, weight = randn(3, 1, 40, dtype=torch.float16), randn(24, 40, dtype=torch.float16)
    assert torch.equal(kernels.linear(x, weight, None)[:, 0], kernels.linear(x[:, 0], weight, None))


@pytest.mark.parametrize("tokens", [0, 33])
def test_a_product_of_more_tokens_than_the_kernel_computes_is_refused(tokens: int) -> None:
    with pytest.raises(ValueError):
        kernels.linear(randn(tokens, 8, dtype=torch.float16), randn(4, 8, dtype=torch.float16), None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("of", "outs", "ins"), SHAPES)
def test_a_tokens_product_has_the_same_bits_in_any_company(
    dtype: torch.dtype, of: int, outs: int, ins: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_tile(of, monkeypatch)
    x, weight = randn(32, ins, dtype=dtype, seed=1), randn(outs, ins, dtype=dtype, seed=2)
    together = kernels.linear(x, weight, None)
    for count in (1, 5, 16, 17):
        for start in (0, 3, 32 - count):
            part = slice(start, start + count)
            assert torch.equal(kernels.linear(x[part], weight, None), together[part]), (count, start)
    # the same token at each place
    for count in (5, 16, 17, 32):
        same = kernels.linear(x[:1].repeat(count, 1), weight, None)
        assert (same == together[:1]).all(), count


# Linear layers of many tokens

# out and in: whole tiles and not, and in features that are fewer than a tile's
SHAPES_OF_MANY = [(128, 128), (130, 200), (40, 24)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outs", "ins"), SHAPES_OF_MANY)
@pytest.mark.parametrize("tokens", [1, 64, 150])
def test_a_product_of_many_tokens_is_that_of_torch(dtype: torch.dtype, outs: int, ins: int, tokens: int) -> None:
    x, weight = randn(1, tokens, ins, dtype=dtype, seed=1), randn(outs, ins, dtype=dtype, seed=2)
    bias = randn(outs, dtype=dtype, seed=3) if tokens > 1 else None
    result = kernels.prefill_linear(x, weight, bias)
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert result.dtype == dtype and result.shape == (1, tokens, outs)
    assert ((result.double() - exact).abs() <= rounding(exact, dtype) + 1e-6 * math.sqrt(ins)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outs", "ins"), SHAPES_OF_MANY)
def test_a_tokens_product_has_the_same_bits_among_any_number(dtype: torch.dtype, outs: int, ins: int) -> None:
    x, weight = randn(150, ins, dtype=dtype, seed=1), randn(outs, ins, dtype=dtype, seed=2)
    # less the rounded product of one token: what remains of its own shows bits that are rounded away
    bias = -kernels.prefill_linear(x[:1], weight, None)[0]
    together = kernels.prefill_linear(x, weight, bias)
    for count in (1, 16, 65, 149):
        for start in (0, 3, 150 - count):
            part = slice(start, start + count)
            assert torch.equal(kernels.prefill_linear(x[part], weight, bias), together[part]), (count, start)
    same = kernels.prefill_linear(x[:1].repeat(130, 1), weight, bias)
    assert (same == together[:1]).all()


# The next ids

VOCABULARY, CONTEXT = 1000, 60

SAMPLINGS = [
    Sampling(temperature=0),
    Sampling(temperature=0, repetition_penalty=1.8),
    Sampling(temperature=0.7, top_p=0.95, top_k=50, repetition_penalty=1.1),
    Sampling(temperature=1.0, top_k=64),
    Sampling(temperature=0.1, top_k=1),
    Sampling(temperature=1.3, top_p=0.0, top_k=40),
    Sampling(temperature=0.9, top_p=0.3, top_k=20, repetition_penalty=2.0),
    Sampling(temperature=2.0, top_p=0.8, top_k=7, repetition_penalty=0.8),
    Sampling(temperature=0.01, top_p=0.99, top_k=3),
]


def rows_of(samplings: list[Sampling]) -> SamplingRows:
    rows = SamplingRows.empty(len(samplings), torch.device(DEVICE))
    for row, sampling in enumerate(samplings):
        rows.put(row, sampling)
    return rows


class Rows:
    """What a Runner holds of some rows, and what the kernels make of it."""

    def __init__(self, samplings: list[Sampling], seed: int, vocabulary: int = VOCABULARY):
        generator = torch.Generator().manual_seed(seed)
        count = len(samplings)
        self.logits = randn(count, vocabulary, seed=seed) * 3
        self.positions = torch.randint(0, CONTEXT - 1, (count,), generator=generator)
        # of few ids, many of them twice
        history = torch.randint(0, 30, (count, CONTEXT), generator=generator)
        columns = torch.arange(CONTEXT)
        self.padded = torch.where(columns <= self.positions[:, None], history, history[:, :1]).to(DEVICE)
        """What llm.engine.sampling reads."""
        self.history = history.to(DEVICE)
        """The same up to each position, with other ids from there on, which nothing may read."""
        self.positions = self.positions.to(DEVICE)
        self.active = (torch.arange(count) % 4 != 3).to(DEVICE)
        self.chosen = torch.full((count,), 12345, device=DEVICE)
        self.sampling = rows_of(samplings)

    def choose(self, width: int) -> None:
        kernels.choose(
            self.logits,
            self.history,
            self.positions,
            self.active,
            self.chosen,
            **vars(self.sampling),
            width=width,
        )

    def expected(self, width: int) -> Tensor:
        return sample(self.logits, self.padded, self.sampling, self.positions + self.active, width)


@pytest.mark.parametrize("seed", range(3))
def test_the_penalty_is_that_of_sampling(seed: int) -> None:
    rows = Rows(SAMPLINGS, seed)
    penalized = torch.empty_like(rows.logits)
    penalty = rows.sampling.repetition_penalty
    kernels.penalize(rows.logits, rows.history, rows.positions, penalty, penalized)
    assert torch.equal(penalized, penalize(rows.logits, rows.padded, penalty))


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_the_chosen_ids_are_those_of_sampling(seed: int, rounded: bool) -> None:
    samplings = [replace(each, seed=2**62 + 7 * seed + row) for row, each in enumerate(SAMPLINGS * 3)]
    rows = Rows(samplings, seed)
    if rounded:
        # many logits tie, as those of bfloat16 do
        rows.logits = rows.logits.bfloat16().float()
    expected, history, positions = rows.expected(128), rows.history.clone(), rows.positions.clone()
    rows.choose(128)
    assert rows.chosen.tolist() == expected.tolist()
    for row, active in enumerate(rows.active.tolist()):
        if active:
            history[row, positions[row] + 1] = expected[row]
    assert torch.equal(rows.history, history)
    assert torch.equal(rows.positions, positions + rows.active)


def test_rows_of_one_distribution_draw_as_sampling_does() -> None:
    """Each by its seed and position: the noise is the same to the last bits."""
    count = 150
    seeds = [*range(count - 2), 2**63 - 1, -1]
    rows = Rows([Sampling(temperature=1.5, top_k=60, seed=seed) for seed in seeds], seed=3)
    rows.logits = rows.logits[:1].expand(count, -1).contiguous()
    expected = rows.expected(128)
    rows.choose(128)
    assert rows.chosen.tolist() == expected.tolist()
    assert len(set(expected.tolist())) > 20


def test_greedy_rows_need_no_sort() -> None:
    rows = Rows(SAMPLINGS[:2] * 2, seed=4)
    # the first of the largest
    rows.logits[2, [7, 900]] = 100
    expected = rows.expected(0)
    rows.choose(0)
    assert rows.chosen.tolist() == expected.tolist()
    assert rows.chosen[2] == 7


def test_a_vocabulary_may_be_smaller_than_the_width() -> None:
    rows = Rows([replace(each, seed=row) for row, each in enumerate(SAMPLINGS * 3)], seed=5, vocabulary=100)
    expected = rows.expected(100)
    rows.choose(100)
    assert rows.chosen.tolist() == expected.tolist()


@pytest.mark.parametrize("largest", [0, 100])
@pytest.mark.parametrize("seed", range(3))
def test_a_row_that_draws_from_the_whole_vocabulary_changes_no_other(
    seed: int, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where more tokens tie than the others sort. Nor does the number of rows change what it draws."""
    monkeypatch.setattr(kernels, "MANY_BLOCK", 128)
    of_all = [Sampling(0.8, 0.9, 0), Sampling(1.2, 1.0, 100), Sampling(temperature=1.5, top_k=65)]
    samplings = [replace(each, seed=7 * seed + row) for row, each in enumerate((SAMPLINGS + of_all) * 2)]
    rows = Rows(samplings, seed)
    rows.logits = rows.logits.bfloat16().float().clamp(max=largest)
    positions, history = rows.positions.clone(), rows.history.clone()
    own = [VOCABULARY if each in of_all else 128 for each in (SAMPLINGS + of_all) * 2]
    after = rows.positions + rows.active
    expected = sample_each(rows.logits, rows.padded, rows.sampling, after, own)
    rows.choose(VOCABULARY)
    assert rows.chosen.tolist() == expected.tolist()
    assert torch.equal(rows.positions, after)
    for row, width in enumerate(own):
        alone = Rows(samplings[row : row + 1], seed)
        alone.logits, alone.history = rows.logits[row : row + 1], history[row : row + 1]
        alone.positions, alone.active = positions[row : row + 1].clone(), rows.active[row : row + 1]
        alone.choose(width)
        assert alone.chosen.tolist() == expected[row : row + 1].tolist()


def test_a_token_that_the_temperature_makes_tie_with_the_last_of_top_k_may_be_drawn() -> None:
    temperature = 1.7
    below = torch.arange(1000, dtype=torch.float32) * 1e-3 + 7
    above = below.nextafter(torch.tensor(torch.inf))
    tie = int((below / temperature == above / temperature).nonzero()[0])
    rows = Rows([Sampling(temperature=temperature, top_k=2, seed=seed) for seed in range(60)], seed=6)
    rows.logits.fill_(-50)
    rows.logits[:, 500:503] = torch.tensor([8.0, above[tie], below[tie]])
    expected = rows.expected(128)
    rows.choose(128)
    assert rows.chosen.tolist() == expected.tolist()
    assert set(expected.tolist()) == {500, 501, 502}


@pytest.mark.parametrize("width", [0, 128])
def test_a_row_without_numbers_is_marked_and_its_history_has_an_id(width: int) -> None:
    rows = Rows([Sampling(temperature=0) if width == 0 else SAMPLINGS[2]] * 6, seed=8)
    rows.active.fill_(True)
    rows.logits[0, 40], rows.logits[1, 50], rows.logits[2], rows.logits[3, 60] = (
        torch.nan,
        torch.inf,
        -torch.inf,
        -torch.inf,
    )
    expected = rows.expected(width)
    rows.choose(width)
    assert rows.chosen.tolist() == expected.tolist()
    assert rows.chosen[:3].tolist() == [NOT_A_NUMBER] * 3
    assert rows.history[torch.arange(3), rows.positions[:3]].tolist() == [0, 0, 0]


def test_the_id_of_no_number_is_that_of_sampling() -> None:
    assert kernels.NOT_A_NUMBER == NOT_A_NUMBER
