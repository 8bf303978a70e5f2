"""Attention of a decode step on an x86 CPU: PyTorch's, with bits that depend on no other row."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm.devices import processor

if not processor.runs_kernels():
    pytest.skip("this is no x86 processor with AVX2, or no Linux", allow_module_level=True)

from llm.devices import decode_attention

SHAPES = [(9, 3, 64), (32, 32, 64), (8, 1, 128), (4, 2, 80)]
"""Heads, heads of keys, head size."""
LONGEST = 600


def cache(rows: int, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, and the keys and values of whole rows."""
    heads, key_heads, size = shape
    generator = torch.Generator().manual_seed(0)
    query = 3 * torch.randn(rows, heads, 1, size, generator=generator)
    key, value = torch.randn(2, rows, key_heads, LONGEST, size, generator=generator)
    return query, key, value


def bias(heads: int, position: int, length: int) -> Tensor:
    """Like ALiBi's, of one row: (1, heads, 1, length)."""
    slopes = torch.logspace(0, -6, heads, base=2)[:, None, None]
    mask = slopes * torch.arange(length)[None, None]
    return mask.masked_fill(torch.arange(length) > position, -torch.inf)[None]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("length", [1, 63, 64, 70, LONGEST])
def test_it_is_pytorchs(shape: tuple[int, int, int], length: int, lanes: int) -> None:
    query, key, value = cache(3, shape)
    assert decode_attention.fits(query)
    key, value = key[:, :, :length], value[:, :, :length]
    masks = [bias(shape[0], position, length) for position in (length - 1, length // 2, 0)]
    for mask in (torch.cat(masks), torch.cat(masks)[:, :1], torch.zeros(1, 1, 1, length)):
        exact, plain = (
            F.scaled_dot_product_attention(
                query.to(dtype), key.to(dtype), value.to(dtype), mask.to(dtype), scale=0.1, enable_gqa=True
            ).double()
            for dtype in (torch.float64, torch.float32)
        )
        ours = decode_attention.attend(query, key, value, mask, scale=0.1).double()
        assert (ours - exact).abs().max() < 2 * (plain - exact).abs().max() + 1e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_a_rows_bits_depend_on_its_own_keys_alone(shape: tuple[int, int, int], lanes: int, thread_count: None) -> None:
    query, key, value = cache(4, shape)
    positions = 40, 263, 400, 599

    def alone(row: int, length: int) -> Tensor:
        keys, values = (x[row : row + 1, :, :length] for x in (key, value))
        mask = bias(shape[0], positions[row], length)
        return decode_attention.attend(query[row : row + 1], keys, values, mask, scale=0.125)

    expected = [alone(row, position + 1) for row, position in enumerate(positions)]
    together = torch.cat([bias(shape[0], position, LONGEST) for position in positions])
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        assert torch.equal(decode_attention.attend(query, key, value, together, scale=0.125), torch.cat(expected))
        for row, length in itertools.product(range(3), (448, 512, LONGEST)):
            assert torch.equal(alone(row, length), expected[row])


def test_each_head_may_hide_other_keys() -> None:
    query, key, value = cache(1, (8, 1, 64))
    mask = torch.cat([bias(8, position, LONGEST)[:, :1] for position in range(100, 500, 50)], 1)
    ours = decode_attention.attend(query, key, value, mask, scale=0.125)
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True))


@pytest.mark.parametrize("which", range(3))
def test_what_is_not_a_number_shows(which: int, lanes: int) -> None:
    inputs = cache(2, (4, 2, 64))
    inputs[which][1, 1, 0, 5] = torch.nan
    mask = torch.zeros(2, 1, 1, LONGEST)
    isnan = decode_attention.attend(*inputs, mask, scale=0.125).isnan()
    assert not isnan[0].any()
    assert isnan[1].any()


def test_what_it_is_not_made_for_is_left_to_pytorch() -> None:
    assert not decode_attention.fits(torch.zeros(1, 2, 1, 64).bfloat16())
    assert not decode_attention.fits(torch.zeros(1, 2, 3, 64))
    assert not decode_attention.fits(torch.zeros(1, 2, 1, 20))
