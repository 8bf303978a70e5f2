"""A decode step of a layer like Llama's in one kernel, on an x86 CPU: what PyTorch computes, row by row."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm.devices import processor

if not processor.runs_kernels():
    pytest.skip("this is no x86 processor with AVX2, or no Linux", allow_module_level=True)

from llm.devices.decode_layer import DecodeLayer, Shape
from llm.devices.products import PackedWeight

ROWS, LENGTH, CAPACITY = 15, 70, 80
SHAPE = Shape(
    width=96,
    query_heads=6,
    key_heads=2,
    head_size=32,
    inner=160,
    scale=0.2,
    least=(1e-3, 2e-3),
    stored=(torch.bfloat16, torch.float16, torch.float32, torch.bfloat16),
)
WITH_HEAD_NORMS = replace(SHAPE, least=(1e-3, 2e-3, 3e-3, 40))


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@dataclass
class Step:
    """What a step reads, of rows at different positions, and the weights of its layer."""

    shape: Shape

    def __post_init__(self) -> None:
        shape = self.shape
        self.norms = [
            1 + 0.1 * random(width)
            for width, _ in zip((shape.width, shape.width, shape.head_size, shape.head_size), shape.least, strict=False)
        ]
        self.weights = [
            (random(outputs, inputs) * inputs**-0.5).to(dtype)
            for outputs, inputs, dtype in zip(shape.outputs, shape.inputs, shape.stored, strict=True)
        ]
        self.biases = [random(outputs) for outputs in shape.outputs]
        self.x = 3 * random(ROWS, 1, shape.width)
        self.cosine, self.sine = random(ROWS, 1, shape.head_size), random(1, ROWS, shape.head_size).view(ROWS, 1, -1)
        self.keys, self.values = random(2, ROWS + 1, shape.key_heads, CAPACITY, shape.head_size)
        self.positions = torch.arange(ROWS) * 5 % LENGTH
        sees = torch.arange(LENGTH) <= self.positions[:, None]
        self.mask = torch.zeros(ROWS, 1, 1, LENGTH).masked_fill(~sees[:, None, None], -torch.inf)

    def layer(self) -> DecodeLayer:
        packed = [PackedWeight(weight, bias) for weight, bias in zip(self.weights, self.biases, strict=True)]
        return DecodeLayer(self.shape, self.norms, packed)

    def computed(self, *rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """The result of some rows, computed together, and what the cache then holds."""
        at = list(rows) or list(range(ROWS))
        keys, values = self.keys[[*at, ROWS]].clone(), self.values[[*at, ROWS]].clone()
        x, cosine, sine, mask = (tensor[at] for tensor in (self.x, self.cosine, self.sine, self.mask))
        result = self.layer().step(x, cosine, sine, mask, keys, values, self.positions[at], LENGTH)
        return result, keys, values

    def exact(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same in float64, as PyTorch computes it."""
        shape, size = self.shape, self.shape.head_size

        def norm(x: Tensor, index: int) -> Tensor:
            return x / (x.square().sum(-1, keepdim=True) + shape.least[index]).sqrt() * self.norms[index].double()

        def product(x: Tensor, index: int) -> Tensor:
            return F.linear(x, self.weights[index].double(), self.biases[index].double())

        x, cosine, sine = self.x.double(), self.cosine.double(), self.sine.double()
        heads = product(norm(x, 0), 0).view(ROWS, -1, size)
        queries, new_keys, new_values = heads.split([shape.query_heads, shape.key_heads, shape.key_heads], 1)
        if len(shape.least) > 2:
            queries, new_keys = norm(queries, 2), norm(new_keys, 3)
        queries, new_keys = (y * cosine + y.roll(size // 2, -1) * sine for y in (queries, new_keys))
        keys, values = self.keys.double(), self.values.double()
        for row, position in enumerate(self.positions):
            keys[row, :, position], values[row, :, position] = new_keys[row], new_values[row]
        attended = F.scaled_dot_product_attention(
            queries[:, :, None],
            keys[:ROWS, :, :LENGTH],
            values[:ROWS, :, :LENGTH],
            self.mask.double(),
            scale=shape.scale,
            enable_gqa=True,
        )
        x = x + product(attended.view(ROWS, 1, -1), 1)
        gate, up = product(norm(x, 1), 2).chunk(2, -1)
        return x + product(F.silu(gate) * up, 3), keys, values


@pytest.mark.parametrize("shape", [SHAPE, WITH_HEAD_NORMS], ids=["plain", "with norms of heads"])
def test_a_step_is_pytorchs(shape: Shape, lanes: int) -> None:
    step = Step(shape)
    assert shape.fits()
    for result, exact in zip(step.computed(), step.exact(), strict=True):
        torch.testing.assert_close(result.double(), exact, rtol=2e-5, atol=2e-5)


def test_gates_go_from_where_exp_is_0_to_where_it_is_infinite(lanes: int) -> None:
    step = Step(SHAPE)
    gates = 120 * random(SHAPE.inner)
    gates[:4] = torch.tensor([0, -0.0, 1e-30, -1e-30])
    step.weights[2].zero_()[-1, 0] = 1 / 3  # no value of 16 bits
    step.biases[2][: SHAPE.inner] = gates
    step.weights[3] = torch.eye(SHAPE.width, SHAPE.inner).bfloat16()
    torch.testing.assert_close(step.computed()[0].double(), step.exact()[0], rtol=2e-6, atol=2e-5)


def test_a_rows_bits_depend_on_no_other_row_and_on_no_number_of_threads(lanes: int, thread_count: None) -> None:
    step = Step(SHAPE)
    torch.set_num_threads(1)
    together = step.computed()
    for threads, rows in ((1, (0,)), (2, (3,)), (2, (5, 1, 14)), (3, tuple(range(13))), (7, (14,)), (7, ())):
        torch.set_num_threads(threads)
        at = list(rows) or list(range(ROWS))
        for result, of_all in zip(step.computed(*rows), together, strict=True):
            assert torch.equal(result[: len(at)], of_all[at])


def test_what_is_not_a_number_stays_in_its_row(lanes: int) -> None:
    step = Step(SHAPE)
    step.x[4, 0, 7] = torch.nan
    assert step.computed()[0].isnan().flatten(1).any(1).nonzero().flatten().tolist() == [4]


def test_there_is_no_kernel_for_what_is_no_whole_vector(lanes: int) -> None:
    shapes = replace(SHAPE, head_size=24), replace(SHAPE, inner=168), replace(SHAPE, width=100)
    assert [shape.fits() for shape in shapes] == [False, False, False]
