"""A decode step of a decoder layer like Llama's, for an x86 processor: one kernel, in place of thirty operations.

A small model's step is hundreds of operations, for which Python and the start of the threads take longer than the
operations themselves. Here the threads start once for a layer, and wait for each other between its stages. A row's bits
depend on no other row, nor on the number of threads.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from llvmlite import ir
from torch import Tensor

from llm.devices import decode_attention, jit, products
from llm.devices.decode_attention import queries_together
from llm.devices.jit import FLOAT, I64, POINTER, at, loop, part
from llm.devices.products import PackedWeight

PRODUCTS = ("queries_keys_values", "output", "gate_and_up", "down")
NORMS = ("before_attention", "before_mlp", "of_queries", "of_keys")
TENSORS = ("x", "result", "cosine", "sine", "mask", "keys", "values", "positions", "workspace")
NUMBERS = ("rows", "length", "capacity", "mask_row", "mask_head")
ARGUMENTS = {
    **dict.fromkeys([*TENSORS, *NORMS, *PRODUCTS, *(f"bias_of_{name}" for name in PRODUCTS)], POINTER),
    **dict.fromkeys(NUMBERS, I64),
}


@dataclass(frozen=True)
class Shape:
    """What the kernel of a layer is compiled for."""

    width: int
    query_heads: int
    key_heads: int
    head_size: int
    inner: int
    """Outputs of the gate."""
    scale: float
    """Of the scores of attention."""
    least: tuple[float, ...]
    """Of each of NORMS, the last two where heads have norms: what is added to the sum of squares."""
    stored: tuple[torch.dtype, ...]
    """Of the weights of each of PRODUCTS."""

    @property
    def inputs(self) -> tuple[int, ...]:
        """Of each of PRODUCTS."""
        return self.width, self.query_heads * self.head_size, self.width, self.inner

    @property
    def outputs(self) -> tuple[int, ...]:
        heads = self.query_heads + 2 * self.key_heads
        return heads * self.head_size, self.width, 2 * self.inner, self.width

    @property
    def buffers(self) -> tuple[int, ...]:
        """Floats that a row has in the workspace, for each of what `_Code._layer` keeps there."""
        return (
            self.width,
            self.outputs[0],
            self.inputs[1],
            self.width,
            self.outputs[2],
            self.inner,
            max(self.inputs),
        )

    @property
    def together(self) -> int:
        """Queries that one task of attention computes."""
        return queries_together(self.query_heads // self.key_heads, self.head_size, jit.lanes())

    def fits(self) -> bool:
        """Whether there is a kernel for it: all is whole vectors, and products are whole panels."""
        return all(number % (2 * jit.lanes()) == 0 for number in (*self.outputs, *self.inputs, self.head_size))


class DecodeLayer:
    """The weights of a layer, and its decode step."""

    def __init__(self, shape: Shape, norms: Sequence[Tensor], weights: Sequence[PackedWeight]):
        """norms: the weights of NORMS, times the square root of their width, float32; weights: of PRODUCTS."""
        assert shape.stored == tuple(weight.dtype for weight in weights)
        self.shape = shape
        self._together = shape.together
        self._floats = sum(shape.buffers)
        self._held = norms, weights
        of_norms = [norm.data_ptr() for norm in norms] + [0] * (len(NORMS) - len(norms))
        of_weights, of_biases = zip(*(weight.pointers for weight in weights), strict=True)
        self._pointers = *of_norms, *of_weights, *of_biases

    @functools.cached_property
    def _kernel(self) -> jit.Kernel:
        return _compiled(self.shape, jit.lanes())

    def step(
        self,
        x: Tensor,
        cosine: Tensor,
        sine: Tensor,
        mask: Tensor,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        length: int,
    ) -> Tensor:
        """x (rows, 1, width); cosine and sine (rows, 1, head size), the sine negative where the rotation turns a sign;
        mask, additive, (rows or 1, heads or 1, 1, length); keys and values, of the cache, (more rows, key heads,
        capacity, head size), to which each row writes at its position; positions (rows,) int64. All else is float32.
        Attention reads the first `length` positions. Returns (rows, 1, width).
        """
        rows, threads = len(x), torch.get_num_threads()
        assert cosine.shape == sine.shape == (rows, 1, self.shape.head_size)
        x, cosine, sine = x.contiguous(), cosine.contiguous(), sine.contiguous()
        mask = mask.expand(rows, self.shape.query_heads, 1, length)
        scores = threads * self._together * -(-length // jit.lanes()) * jit.lanes()
        workspace = x.new_empty(rows * self._floats + scores)
        result = torch.empty_like(x)
        tensors = x, result, cosine, sine, mask, keys, values, positions, workspace
        self._kernel(
            *(tensor.data_ptr() for tensor in tensors),
            *self._pointers,
            rows,
            length,
            keys.shape[2],
            mask.stride(0),
            mask.stride(1),
            threads,
        )
        return result


@functools.cache
def _compiled(shape: Shape, lanes: int) -> jit.Kernel:
    return _Code(shape, lanes).compiled()


class _Code(jit.Code):
    def __init__(self, shape: Shape, lanes: int):
        super().__init__(lanes)
        self.shape = shape
        self.parallel([*ARGUMENTS.values()], self._layer)

    def _layer(self, b: ir.IRBuilder, number: ir.Value, threads: ir.Value, *arguments: ir.Value) -> None:
        shape, given = self.shape, dict(zip(ARGUMENTS, arguments, strict=True))
        rows, x, result = given["rows"], given["x"], given["result"]
        buffers, offset = [], 0
        for floats in (*shape.buffers, 0):
            buffers.append(at(b, given["workspace"], b.mul(rows, I64(offset))))
            offset += floats
        normed, heads, attended, product, gate_and_up, gated, reordered, scores = buffers

        def multiply(index: int, inputs: ir.Value, outputs: ir.Value) -> None:
            name, panels = PRODUCTS[index], shape.outputs[index] // (2 * self.lanes)
            # a single row's values are side by side
            order = b.select(b.icmp_signed("==", rows, I64(1)), inputs, reordered)
            weights = given[name], given[f"bias_of_{name}"]
            kernel = products.compiled(shape.stored[index], self.lanes)
            self.barrier(b)
            numbers = rows, I64(shape.inputs[index]), I64(panels)
            self.call(b, kernel, number, threads, inputs, order, *weights, outputs, *numbers)
            self.barrier(b)

        def of_row(row: ir.Value, *buffers: ir.Value) -> list[ir.Value]:
            return [at(b, buffer, b.mul(row, I64(shape.width))) for buffer in buffers]

        vectors, least = I64(shape.width // self.lanes), [ir.Constant(FLOAT, value) for value in shape.least]
        with loop(b, *part(b, rows, threads, number)) as (row, _):
            source, target = of_row(row, x, normed)
            self._normalize(b, source, target, given["before_attention"], shape.width, least[0])
        multiply(0, normed, heads)
        self._rotate(b, number, threads, given, heads)
        self.barrier(b)
        self._attend(b, number, threads, given, heads, attended, scores)
        multiply(1, attended, product)
        with loop(b, *part(b, rows, threads, number)) as (row, _):
            added, source, total, target = of_row(row, product, x, result, normed)
            self._add(b, added, source, total, I64(0), vectors)
            self._normalize(b, total, target, given["before_mlp"], shape.width, least[1])
        multiply(2, normed, gate_and_up)
        with loop(b, I64(0), rows) as (row, _):
            outputs = at(b, gate_and_up, b.mul(row, I64(2 * shape.inner)))
            self._gate(b, outputs, at(b, gated, b.mul(row, I64(shape.inner))), number, threads)
        multiply(3, gated, product)
        start, stop = part(b, b.mul(rows, vectors), threads, number)
        self._add(b, product, result, result, start, stop)

    def _normalize(
        self, b: ir.IRBuilder, x: ir.Value, result: ir.Value, weight: ir.Value, width: int, least: ir.Value
    ) -> None:
        """x / sqrt(sum of its squares + least) * weight."""
        vectors = I64(width // self.lanes)
        with loop(b, I64(0), vectors, [self.constant(0)]) as (index, sums):
            value = self._vector(b, x, index)
            sums[0] = self.multiply_add(b, value, value, sums[0])
        root = self.function("llvm.sqrt.f32", FLOAT, [FLOAT])
        total = b.fadd(self.reduced(b, "fadd", sums[0]), least)
        length = self.repeated(b, b.call(root, [total]))
        with loop(b, I64(0), vectors) as (index, _):
            normed = b.fdiv(self._vector(b, x, index), length)
            self._store(b, b.fmul(normed, self._vector(b, weight, index)), result, index)

    def _rotate(
        self, b: ir.IRBuilder, number: ir.Value, threads: ir.Value, given: dict[str, ir.Value], heads: ir.Value
    ) -> None:
        """Rotate queries and keys in place, behind their norms, and write keys and values to the cache."""
        shape, size = self.shape, I64(self.shape.head_size)
        of_row = shape.query_heads + 2 * shape.key_heads
        with loop(b, *part(b, b.mul(given["rows"], I64(of_row)), threads, number)) as (task, _):
            row, head = b.sdiv(task, I64(of_row)), b.srem(task, I64(of_row))
            here = at(b, heads, b.mul(task, size))
            is_query = b.icmp_signed("<", head, I64(shape.query_heads))
            is_value = b.icmp_signed(">=", head, I64(shape.query_heads + shape.key_heads))
            with b.if_then(b.not_(is_value)):
                if len(shape.least) > 2:
                    weight = b.select(is_query, given["of_queries"], given["of_keys"])
                    least = b.select(is_query, *(ir.Constant(FLOAT, value) for value in shape.least[2:]))
                    self._normalize(b, here, here, weight, shape.head_size, least)
                cosine, sine = (at(b, given[name], b.mul(row, size)) for name in ("cosine", "sine"))
                half = shape.head_size // (2 * self.lanes)
                parts = [self.load(b, here, i * self.lanes) for i in range(2 * half)]
                for i, value in enumerate(parts):
                    turned = b.fmul(value, self.load(b, cosine, i * self.lanes))
                    other = b.fmul(parts[i - half], self.load(b, sine, i * self.lanes))
                    self._store(b, b.fadd(turned, other), here, I64(i))
            with b.if_then(b.not_(is_query)):
                first = I64(shape.query_heads)
                key_head = b.srem(b.sub(head, first), I64(shape.key_heads))
                position = b.load(at(b, given["positions"], row, I64), typ=I64)
                line = b.add(b.mul(b.add(b.mul(row, I64(shape.key_heads)), key_head), given["capacity"]), position)
                target = at(b, b.select(is_value, given["values"], given["keys"]), b.mul(line, size))
                for i in range(shape.head_size // self.lanes):
                    self._store(b, self.load(b, here, i * self.lanes), target, I64(i))

    def _attend(
        self,
        b: ir.IRBuilder,
        number: ir.Value,
        threads: ir.Value,
        given: dict[str, ir.Value],
        heads: ir.Value,
        result: ir.Value,
        scores: ir.Value,
    ) -> None:
        shape = self.shape
        of_head = b.mul(given["capacity"], I64(shape.head_size))
        of_row = b.mul(of_head, I64(shape.key_heads))
        tensors = heads, given["keys"], given["values"], given["mask"], result, scores
        tasks = b.mul(given["rows"], I64(shape.query_heads // shape.together))
        counts = tasks, I64(shape.query_heads), I64(shape.query_heads // shape.key_heads), given["length"]
        steps = I64(shape.outputs[0]), of_row, of_head, of_row, of_head, given["mask_row"], given["mask_head"]
        kernel = decode_attention.compiled(shape.head_size, shape.together, self.lanes)
        self.call(b, kernel, number, threads, *tensors, *counts, *steps, ir.Constant(FLOAT, shape.scale))

    def _gate(
        self, b: ir.IRBuilder, gate_and_up: ir.Value, result: ir.Value, number: ir.Value, threads: ir.Value
    ) -> None:
        """silu(gate) * up, of one row."""
        one, zero, vectors = self.constant(1), self.constant(0), I64(self.shape.inner // self.lanes)
        with loop(b, *part(b, vectors, threads, number)) as (index, _):
            gate, up = (self._vector(b, gate_and_up, b.add(index, first)) for first in (I64(0), vectors))
            positive = b.fcmp_ordered(">", gate, zero)
            power = self.exp(b, b.select(positive, b.fneg(gate), gate))
            # the sigmoid is 1 / (1 + exp(-gate)), and exp(gate) / (1 + exp(gate))
            silu = b.fdiv(b.fmul(gate, b.select(positive, one, power)), b.fadd(one, power))
            self._store(b, b.fmul(silu, up), result, index)

    def _add(
        self, b: ir.IRBuilder, x: ir.Value, y: ir.Value, result: ir.Value, start: ir.Value, stop: ir.Value
    ) -> None:
        """x + y, the vectors from one to another."""
        with loop(b, start, stop) as (index, _):
            self._store(b, b.fadd(self._vector(b, x, index), self._vector(b, y, index)), result, index)

    def _vector(self, b: ir.IRBuilder, pointer: ir.Value, index: ir.Value) -> ir.Value:
        return self.load(b, pointer, b.mul(index, I64(self.lanes)))

    def _store(self, b: ir.IRBuilder, vector: ir.Value, pointer: ir.Value, index: ir.Value) -> None:
        b.store(vector, at(b, pointer, b.mul(index, I64(self.lanes))), align=4)
