"""Products on an x86 CPU: float32's, their bits the same for any number of rows and threads, and any vectors."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm.devices import forward, linear

if not linear.Float32Linear.is_fast():
    pytest.skip("this is no x86 processor with AVX2, or no Linux", allow_module_level=True)

from llm.devices import jit, products

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(64, 32), (1, 7), (50, 33), (576, 576), (333, 129)]
"""Out features, in features."""


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_float32s(shape: tuple[int, int], dtype: torch.dtype, lanes: int) -> None:
    weight, bias = random(*shape).to(dtype), random(shape[0])
    packed = products.PackedWeight(weight, bias)
    assert packed.dtype == dtype
    for rows in (1, 2, 5, 6, 7, 12, 13, 29, 100):
        x = random(rows, shape[1])
        exact = F.linear(x.double(), weight.double(), bias.double())
        # one rounding for each term of the sum, at most, and as large as the terms
        bound = shape[1] * 2**-24 * F.linear(x.abs(), weight.float().abs(), bias.abs()).double()
        assert ((packed.product(x).double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rows_bits_depend_on_no_other_row_and_on_no_number_of_threads(
    dtype: torch.dtype, lanes: int, thread_count: None
) -> None:
    packed = products.PackedWeight(random(333, 129).to(dtype), None)
    x = random(61, 129)
    alone = torch.cat([packed.product(row) for row in x.split(1)])
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        for first, rows in ((0, 61), (3, 12), (17, 13), (60, 1), (5, 2)):
            assert torch.equal(packed.product(x[first : first + rows]), alone[first : first + rows])


def test_nor_on_how_many_values_a_vector_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for lanes in (8, 16):
        monkeypatch.setattr(jit, "lanes", lambda lanes=lanes: lanes)
        results.append(products.PackedWeight(random(333, 129).bfloat16(), random(333)).product(random(9, 129)))
    assert torch.equal(*results)


def test_a_weight_takes_16_bits_where_they_hold_its_values() -> None:
    for dtype in DTYPES:
        weight = random(40, 30).to(dtype).float()
        narrow = products.narrowest(weight)
        assert narrow.dtype == dtype
        assert torch.equal(narrow.float(), weight)


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (4, 1), (2, 3), (5,)])
def test_a_layer_takes_any_shape_and_skips_padding(shape: tuple[int, ...]) -> None:
    plain = torch.nn.Linear(64, 33)
    # OPT's layers see rows and tokens as one
    pass_ = forward.Pass(length=5, start=0, rows=slice(1), tokens=5, prompt_tokens=torch.tensor([0, 3]))
    x = random(*shape, 64)
    with torch.inference_mode(), forward.run(pass_):
        expected, result = plain(x), linear.Float32Linear(plain.weight, plain.bias)(x)
        if len(shape) == 1:
            expected[[1, 2, 4]] = 0
    torch.testing.assert_close(result, expected)


def test_no_rows_have_no_product() -> None:
    assert products.PackedWeight(random(40, 30), None).product(torch.empty(2, 0, 30)).shape == (2, 0, 40)
