"""Products of float32 with weights of 16 bits, for an x86 processor.

A product reads each weight once, as narrow as the checkpoint has it. Each value of the result is one chain of fused
multiply-adds: the bias, then one input feature after another. Its bits depend on no other row, nor on the number of
threads, nor on how many values the processor's vectors hold.

Weights lie in panels. A panel holds two vectors of weights for each input feature, those of 2 * lanes output features;
a kernel multiplies a panel by a few rows of inputs, and holds their sums in the processor's registers.
"""

import functools

import torch
import torch.nn.functional as F
from llvmlite import ir
from torch import Tensor

from llm.devices import jit
from llm.devices.jit import BYTE, FLOAT, HALF, I32, I64, POINTER, VOID, at, loop, part

AHEAD = 4096
"""Bytes from the weights that a kernel reads to those that it asks the memory for."""


class PackedWeight:
    """A linear layer's weight and bias, laid out for its products."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        """weight (out features, in features), bias (out features,): of any floating dtype."""
        weight = narrowest(weight)
        self.dtype = weight.dtype
        self.out_features, self.in_features = weight.shape
        width = 2 * jit.lanes()
        self._panels = -(-self.out_features // width)
        self._padded = self._panels * width
        if missing := self._padded - self.out_features:
            weight = F.pad(weight, (0, 0, 0, missing))
            bias = None if bias is None else F.pad(bias, (0, missing))
        self._bias = torch.zeros(self._padded) if bias is None else bias.detach().float()
        weight = weight.contiguous()
        self._weight = torch.empty(self._panels, self.in_features, width, dtype=self.dtype)
        pack = _packing(self.dtype, jit.lanes())
        pack(weight.data_ptr(), self._weight.data_ptr(), self.in_features, self._panels, torch.get_num_threads())

    @functools.cached_property
    def _product(self) -> jit.Kernel:
        # not where weights are packed side by side: each thread would have it compiled
        return compiled(self.dtype, jit.lanes())

    @property
    def pointers(self) -> tuple[int, int]:
        """Of the weight and the bias, for another kernel."""
        return self._weight.data_ptr(), self._bias.data_ptr()

    def product(self, x: Tensor) -> Tensor:
        """x (..., in features) float32. Returns (..., out features) float32."""
        x = x.contiguous()
        rows = x.numel() // self.in_features
        result = x.new_empty(*x.shape[:-1], self._padded)
        reordered = x if rows == 1 else torch.empty_like(x)
        self._product(
            x.data_ptr(),
            reordered.data_ptr(),
            self._weight.data_ptr(),
            self._bias.data_ptr(),
            result.data_ptr(),
            rows,
            self.in_features,
            self._panels,
            torch.get_num_threads(),
        )
        return result if self._padded == self.out_features else result[..., : self.out_features]


def narrowest(weight: Tensor) -> Tensor:
    """The weight in 16 bits, where they hold each of its values exactly; else in float32."""
    if weight.dtype in (torch.bfloat16, torch.float16):
        return weight
    narrow = (weight.to(dtype) for dtype in (torch.bfloat16, torch.float16))
    return next((candidate for candidate in narrow if torch.equal(candidate.to(weight.dtype), weight)), weight.float())


def compile_ahead(dtype: torch.dtype) -> None:
    """Compile what weights of a dtype need. LLVM does not hold Python's lock."""
    _packing(dtype, jit.lanes())
    compiled(dtype, jit.lanes())


@functools.cache
def compiled(dtype: torch.dtype, lanes: int) -> jit.Kernel:
    """The product with weights of a dtype, for vectors of so many values."""
    return _Code(dtype, lanes).compiled()


@functools.cache
def _packing(dtype: torch.dtype, lanes: int) -> jit.Kernel:
    """Lays weights out in panels. Arguments: weights, panels' memory; in features, panels."""
    code, width, block = jit.Code(lanes), 2 * lanes, 32
    element = ir.IntType(8 * dtype.itemsize)

    def write(
        b: ir.IRBuilder,
        number: ir.Value,
        threads: ir.Value,
        weights: ir.Value,
        packed: ir.Value,
        in_features: ir.Value,
        panels: ir.Value,
    ) -> None:
        def copy(source: ir.Value, target: ir.Value) -> None:
            b.store(b.load(source, typ=element), target)

        whole = b.sdiv(in_features, I64(block))
        with loop(b, *part(b, panels, threads, number)) as (panel, _):
            first = b.mul(b.mul(panel, I64(width)), in_features)
            # in blocks that stay in the processor's cache, of which a line is read once
            with loop(b, I64(0), b.add(whole, I64(1))) as (index, _), loop(b, I64(0), I64(width)) as (row, _):
                column, feature = row, b.mul(index, I64(block))
                if dtype == torch.bfloat16:
                    # a weight of each vector side by side: see _Code._weights
                    column = b.add(b.mul(b.srem(row, I64(lanes)), I64(2)), b.sdiv(row, I64(lanes)))
                source = at(b, weights, b.add(b.add(first, b.mul(row, in_features)), feature), element)
                target = at(b, packed, b.add(b.add(first, b.mul(feature, I64(width))), column), element)
                with b.if_else(b.icmp_signed("<", index, whole)) as (is_whole, is_rest):
                    with is_whole:
                        for i in range(block):
                            copy(at(b, source, i, element), at(b, target, i * width, element))
                    with is_rest, loop(b, I64(0), b.sub(in_features, feature)) as (i, _):
                        copy(at(b, source, i, element), at(b, target, b.mul(i, I64(width)), element))

    code.parallel([POINTER] * 2 + [I64] * 2, write)
    return code.compiled()


class _Code(jit.Code):
    def __init__(self, dtype: torch.dtype, lanes: int):
        super().__init__(lanes)
        self.dtype = dtype
        # as many sums as the processor has registers for, beside weights and inputs
        self.most_rows = 12 if lanes == 16 else 6
        self.kernels = {rows: self._kernel(rows) for rows in range(1, self.most_rows + 1)}
        self.parallel([POINTER] * 5 + [I64] * 3, self._task)

    def _kernel(self, rows: int) -> ir.Function:
        """Of a panel and so many rows. Arguments: inputs, weights, bias, outputs; in features, outputs of a row."""
        kernel = self.function(f"kernel_{rows}", VOID, [POINTER] * 4 + [I64] * 2)
        inputs, weights, bias, outputs, in_features, stride = kernel.args
        b = ir.IRBuilder(kernel.append_basic_block())
        start = [self.load(b, bias, i * self.lanes) for i in range(2)]
        with loop(b, I64(0), in_features, start * rows) as (feature, sums):
            values = self._weights(b, weights, feature)
            of_rows = at(b, inputs, b.mul(feature, I64(rows)))
            for row in range(rows):
                x = self.repeated(b, b.load(at(b, of_rows, row), typ=FLOAT))
                for place, value in enumerate(values, 2 * row):
                    sums[place] = self.multiply_add(b, x, value, sums[place])
        for place, value in enumerate(sums):
            row, half = divmod(place, 2)
            b.store(value, at(b, at(b, outputs, b.mul(stride, I64(row))), half * self.lanes), align=4)
        b.ret_void()
        return kernel

    def _weights(self, b: ir.IRBuilder, panel: ir.Value, feature: ir.Value) -> list[ir.Value]:
        """The two vectors of one input feature, in float32."""
        element = {torch.bfloat16: I32, torch.float16: HALF, torch.float32: FLOAT}[self.dtype]
        vectors = 1 if self.dtype == torch.bfloat16 else 2
        place = at(b, panel, b.mul(feature, I64(vectors * self.lanes)), element)
        prefetch = self.function("llvm.prefetch.p0", VOID, [POINTER, I32, I32, I32])
        b.call(prefetch, [at(b, place, AHEAD, BYTE), I32(0), I32(3), I32(1)])
        raw = ir.VectorType(element, self.lanes)
        parts = [b.load(at(b, place, i * self.lanes, element), typ=raw, align=2) for i in range(vectors)]
        if self.dtype == torch.bfloat16:
            # a bfloat16 is the upper half of a float32: of two side by side, one is moved up, the other is there
            upper, sixteen = ir.Constant(raw, [-65536] * self.lanes), ir.Constant(raw, [16] * self.lanes)
            return [b.bitcast(b.shl(parts[0], sixteen), self.vector), b.bitcast(b.and_(parts[0], upper), self.vector)]
        return parts if self.dtype == torch.float32 else [b.fpext(part, self.vector) for part in parts]

    def _task(
        self,
        b: ir.IRBuilder,
        number: ir.Value,
        threads: ir.Value,
        inputs: ir.Value,
        reordered: ir.Value,
        weights: ir.Value,
        bias: ir.Value,
        outputs: ir.Value,
        rows: ir.Value,
        in_features: ir.Value,
        panels: ir.Value,
    ) -> None:
        """reordered: memory for the inputs in another order, or the inputs where there is one row.

        Rows are computed in blocks, as even as can be. The threads first share the blocks, to put the rows' values
        of one input feature side by side, and then the panels."""
        blocks = b.sdiv(b.add(rows, I64(self.most_rows - 1)), I64(self.most_rows))

        def block_of(index: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
            """Its first row, its number of rows, its inputs in the order of the kernels."""
            first, last = part(b, rows, blocks, index)
            return first, b.sub(last, first), at(b, reordered, b.mul(first, in_features))

        # a single row's values are side by side
        with b.if_then(b.icmp_signed(">", rows, I64(1))):
            with loop(b, *part(b, blocks, threads, number)) as (index, _):
                first, count, ordered = block_of(index)
                with loop(b, I64(0), in_features) as (feature, _), loop(b, I64(0), count) as (row, _):
                    source = at(b, inputs, b.add(b.mul(b.add(first, row), in_features), feature))
                    target = at(b, ordered, b.add(b.mul(feature, count), row))
                    b.store(b.load(source, typ=FLOAT), target)
            self.barrier(b)

        width = 2 * self.lanes
        stride = b.mul(panels, I64(width))
        bytes_of_panel = b.mul(in_features, I64(width * self.dtype.itemsize))
        with loop(b, *part(b, panels, threads, number)) as (panel, _):
            column = b.mul(panel, I64(width))
            of_panel = at(b, weights, b.mul(panel, bytes_of_panel), BYTE), at(b, bias, column)
            with loop(b, I64(0), blocks) as (index, _):
                first, count, ordered = block_of(index)
                place = at(b, outputs, b.add(b.mul(first, stride), column))
                after = b.append_basic_block()
                choice = b.switch(count, after)
                for row_count, kernel in self.kernels.items():
                    choice.add_case(I64(row_count), case := b.append_basic_block())
                    b.position_at_end(case)
                    b.call(kernel, [ordered, *of_panel, place, in_features, stride])
                    b.branch(after)
                b.position_at_end(after)
