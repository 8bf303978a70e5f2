"""What a decode step computes of each row beside products and attention, for an x86 processor: norms and gates.

A small model's step is hundreds of these, each too short for the operations that make it up. A row's bits depend on no
other row.
"""

import functools

import torch
from llvmlite import ir
from torch import Tensor

from llm.devices import jit
from llm.devices.jit import FLOAT, I64, POINTER, at, loop, part

FOR_A_THREAD = 16384
"""Values that are worth another thread."""


def norm(x: Tensor, weight: Tensor, least: float) -> Tensor:
    """x / sqrt(sum of its squares + least) * weight. x (..., width), weight (width,): float32, of whole vectors.
    Returns x's shape."""
    x, result = x.contiguous(), torch.empty_like(x)
    _norm(jit.lanes())(*_pointers(x, weight, result), *_size(x), least, _threads(x))
    return result


def gated(x: Tensor) -> Tensor:
    """silu(gate) * up. x (..., 2 * width) float32: gate and up, of whole vectors. Returns (..., width)."""
    x = x.contiguous()
    result = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    _gated(jit.lanes())(*_pointers(x, result), *_size(result), _threads(x))
    return result


def fits(width: int) -> bool:
    """Whether rows of so many values are whole vectors."""
    return width % jit.lanes() == 0


def _pointers(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(tensor.data_ptr() for tensor in tensors)


def _size(x: Tensor) -> tuple[int, int]:
    width = x.shape[-1]
    return x.numel() // width, width


def _threads(x: Tensor) -> int:
    return min(torch.get_num_threads(), 1 + x.numel() // FOR_A_THREAD)


@functools.cache
def _norm(lanes: int) -> jit.Kernel:
    code = jit.Code(lanes)

    def write(
        b: ir.IRBuilder,
        number: ir.Value,
        threads: ir.Value,
        x: ir.Value,
        weight: ir.Value,
        result: ir.Value,
        rows: ir.Value,
        width: ir.Value,
        least: ir.Value,
    ) -> None:
        vectors, step = b.sdiv(width, I64(code.lanes)), I64(code.lanes)
        with loop(b, *part(b, rows, threads, number)) as (row, _):
            source, target = (at(b, pointer, b.mul(row, width)) for pointer in (x, result))
            with loop(b, I64(0), vectors, [code.constant(0)]) as (index, sums):
                value = code.load(b, source, b.mul(index, step))
                sums[0] = code.multiply_add(b, value, value, sums[0])
            root = code.function("llvm.sqrt.f32", FLOAT, [FLOAT])
            length = code.repeated(b, b.call(root, [b.fadd(code.reduced(b, "fadd", sums[0]), least)]))
            with loop(b, I64(0), vectors) as (index, _):
                place = b.mul(index, step)
                normed = b.fdiv(code.load(b, source, place), length)
                b.store(b.fmul(normed, code.load(b, weight, place)), at(b, target, place), align=4)

    code.parallel([POINTER] * 3 + [I64] * 2 + [FLOAT], write)
    return code.compiled()


@functools.cache
def _gated(lanes: int) -> jit.Kernel:
    code = jit.Code(lanes)

    def write(
        b: ir.IRBuilder,
        number: ir.Value,
        threads: ir.Value,
        x: ir.Value,
        result: ir.Value,
        rows: ir.Value,
        width: ir.Value,
    ) -> None:
        one, zero = code.constant(1), code.constant(0)
        with loop(b, *part(b, rows, threads, number)) as (row, _):
            gates, target = at(b, x, b.mul(row, b.mul(width, I64(2)))), at(b, result, b.mul(row, width))
            with loop(b, I64(0), b.sdiv(width, I64(code.lanes))) as (index, _):
                place = b.mul(index, I64(code.lanes))
                gate, up = code.load(b, gates, place), code.load(b, gates, b.add(place, width))
                positive = b.fcmp_ordered(">", gate, zero)
                power = code.exp(b, b.select(positive, b.fneg(gate), gate))
                # the sigmoid is 1 / (1 + exp(-gate)), and exp(gate) / (1 + exp(gate))
                silu = b.fdiv(b.fmul(gate, b.select(positive, one, power)), b.fadd(one, power))
                b.store(b.fmul(silu, up), at(b, target, place), align=4)

    code.parallel([POINTER] * 2 + [I64] * 2, write)
    return code.compiled()
