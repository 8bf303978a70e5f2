"""Norms and gates of a decode step on an x86 CPU: PyTorch's, row by row."""

import pytest
import torch
import torch.nn.functional as F

from llm.devices import processor

if not processor.runs_kernels():
    pytest.skip("this is no x86 processor with AVX2, or no Linux", allow_module_level=True)

from llm.devices import rowwise

SHAPES = [(1, 1, 64), (5, 1, 576), (200, 1, 1536), (3, 9, 128)]


@pytest.mark.parametrize("shape", SHAPES)
def test_norms(shape: tuple[int, ...], lanes: int) -> None:
    x, weight = 3 * torch.randn(shape), torch.randn(shape[-1])
    exact = F.rms_norm(x.double(), shape[-1:], weight.double(), eps=1e-5)
    normed = rowwise.norm(x, weight * shape[-1] ** 0.5, 1e-5 * shape[-1])
    torch.testing.assert_close(normed.double(), exact, rtol=1e-6, atol=1e-7)
    assert torch.equal(normed[-1:], rowwise.norm(x[-1:], weight * shape[-1] ** 0.5, 1e-5 * shape[-1]))


@pytest.mark.parametrize("shape", SHAPES)
def test_gates(shape: tuple[int, ...], lanes: int) -> None:
    # from where exp is 0 to where it is infinite
    gate, up = 120 * torch.randn(shape), torch.randn(shape)
    gate[0, 0, :4] = torch.tensor([0, -0.0, 1e-30, -1e-30])
    both = torch.cat([gate, up], -1)
    result = rowwise.gated(both)
    torch.testing.assert_close(result.double(), F.silu(gate.double()) * up, rtol=1e-6, atol=1e-30)
    assert torch.equal(result[-1:], rowwise.gated(both[-1:]))


def test_what_is_not_a_number_stays_so() -> None:
    x = torch.randn(2, 1, 64)
    x[1, 0, 40] = x[1, 0, 3] = torch.nan
    assert rowwise.norm(x, torch.ones(64), 1e-5).isnan().flatten(1).all(1).tolist() == [False, True]
    assert rowwise.gated(x).isnan().sum() == 2
