"""Products of float32 with weights of 16 bits, for x86 processors: LLVM compiles them for the one at hand.

A product reads each weight once, as narrow as the checkpoint has it. Each value of the result is one chain of fused
multiply-adds: the bias, then one input feature after another. Its bits depend on no other row, nor on the number of
threads, nor on how many values the processor's vectors hold.

Weights lie in panels. A panel holds two vectors of weights for each input feature, those of 2 * lanes output features;
a kernel multiplies a panel by a few rows of inputs, and holds their sums in the processor's registers.
"""

import ctypes
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import llvmlite.binding as llvm
import torch
import torch.nn.functional as F
from llvmlite import ir
from torch import Tensor

AHEAD = 4096
"""Bytes from the weights that a kernel reads to those that it asks the memory for."""

VOID, BYTE, I32, I64 = ir.VoidType(), ir.IntType(8), ir.IntType(32), ir.IntType(64)
FLOAT, HALF = ir.FloatType(), ir.HalfType()
POINTER = ir.PointerType()

Product = Callable[[int, int, int, int, int, int, int, int, int], None]
"""Pointers to inputs, to as much memory for them in another order, to weights, bias and outputs; rows, in features,
panels; threads."""
ARGUMENTS = ir.LiteralStructType([POINTER] * 5 + [I64] * 3)
"""Those of a product, but the threads."""


class PackedWeight:
    """A linear layer's weight and bias, laid out for its products."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        """weight (out features, in features), bias (out features,): of any floating dtype."""
        weight = narrowest(weight)
        self.dtype = weight.dtype
        self.out_features, self.in_features = weight.shape
        width = 2 * lanes()
        self._panels = -(-self.out_features // width)
        self._padded = self._panels * width
        if missing := self._padded - self.out_features:
            weight = F.pad(weight, (0, 0, 0, missing))
            bias = None if bias is None else F.pad(bias, (0, missing))
        self._bias = torch.zeros(self._padded) if bias is None else bias.detach().float()
        # of bfloat16, a weight of each vector side by side: see _Writer._weights
        order = (0, 3, 2, 1) if self.dtype == torch.bfloat16 else (0, 3, 1, 2)
        self._weight = weight.view(self._panels, 2, lanes(), self.in_features).permute(order).contiguous()
        self._product = compiled(self.dtype)

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


@functools.cache
def lanes() -> int:
    """How many float32 a vector of the processor holds."""
    return 16 if llvm.get_host_cpu_features().get("avx512f") else 8


def openmp() -> str | None:
    """The library with the threads of torch, GNU's OpenMP; None where torch has another."""
    found = re.search(r"\S*/libgomp\S*", Path("/proc/self/maps").read_text())
    return found[0] if found else None


@functools.cache
def compiled(dtype: torch.dtype) -> Product:
    """The product with weights of a dtype. The first call for each dtype takes a tenth of a second."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    llvm.load_library_permanently(openmp())
    module = llvm.parse_assembly(str(_Writer(dtype, lanes()).module))
    machine = llvm.Target.from_default_triple().create_target_machine(
        llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten(), opt=3, jit=True
    )
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    signature = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 5, *[ctypes.c_int64] * 3, ctypes.c_int32)
    product: Any = signature(engine.get_function_address("product"))
    product.engine = engine  # the code is freed with it
    return cast(Product, product)


class _Writer:
    """LLVM's code of the product with weights of one dtype."""

    def __init__(self, dtype: torch.dtype, lanes: int):
        self.dtype = dtype
        self.lanes = lanes
        self.vector = ir.VectorType(FLOAT, lanes)
        # as many sums as the processor has registers for, beside weights and inputs
        self.most_rows = 12 if lanes == 16 else 6
        self.module = ir.Module()
        self.module.triple = llvm.get_process_triple()
        self.multiply_add = self._declare(f"llvm.fma.v{lanes}f32", self.vector, [self.vector] * 3)
        self.prefetch = self._declare("llvm.prefetch.p0", VOID, [POINTER, I32, I32, I32])
        self.kernels = {rows: self._kernel(rows) for rows in range(1, self.most_rows + 1)}
        self._product(self._task())

    def _declare(self, name: str, result: ir.Type, arguments: list[ir.Type]) -> ir.Function:
        return ir.Function(self.module, ir.FunctionType(result, arguments), name)

    def _kernel(self, rows: int) -> ir.Function:
        """Of a panel and so many rows. Arguments: inputs, weights, bias, outputs; in features, outputs of a row."""
        kernel = self._declare(f"kernel_{rows}", VOID, [POINTER] * 4 + [I64] * 2)
        inputs, weights, bias, outputs, in_features, stride = kernel.args
        b = ir.IRBuilder(kernel.append_basic_block())
        start = [b.load(_at(b, bias, i * self.lanes), typ=self.vector, align=4) for i in range(2)]
        with _loop(b, I64(0), in_features, start * rows) as (feature, sums):
            values = self._weights(b, weights, feature)
            of_rows = _at(b, inputs, b.mul(feature, I64(rows)))
            for row in range(rows):
                x = self._repeated(b, b.load(_at(b, of_rows, row), typ=FLOAT))
                for half, value in enumerate(values):
                    at = 2 * row + half
                    sums[at] = b.call(self.multiply_add, [x, value, sums[at]])
        for row in range(rows):
            for half in range(2):
                place = _at(b, _at(b, outputs, b.mul(stride, I64(row))), half * self.lanes)
                b.store(sums[2 * row + half], place, align=4)
        b.ret_void()
        return kernel

    def _weights(self, b: ir.IRBuilder, panel: ir.Value, feature: ir.Value) -> list[ir.Value]:
        """The two vectors of one input feature, in float32."""
        element = {torch.bfloat16: I32, torch.float16: HALF, torch.float32: FLOAT}[self.dtype]
        vectors = 1 if self.dtype == torch.bfloat16 else 2
        place = _at(b, panel, b.mul(feature, I64(vectors * self.lanes)), element)
        b.call(self.prefetch, [_at(b, place, AHEAD, BYTE), I32(0), I32(3), I32(1)])
        raw = ir.VectorType(element, self.lanes)
        parts = [b.load(_at(b, place, i * self.lanes, element), typ=raw, align=2) for i in range(vectors)]
        if self.dtype == torch.bfloat16:
            # a bfloat16 is the upper half of a float32: of two side by side, one is moved up, the other is there
            upper, sixteen = ir.Constant(raw, [-65536] * self.lanes), ir.Constant(raw, [16] * self.lanes)
            return [b.bitcast(b.shl(parts[0], sixteen), self.vector), b.bitcast(b.and_(parts[0], upper), self.vector)]
        return parts if self.dtype == torch.float32 else [b.fpext(part, self.vector) for part in parts]

    def _repeated(self, b: ir.IRBuilder, value: ir.Value) -> ir.Value:
        undefined = ir.Constant(self.vector, ir.Undefined)
        first = b.insert_element(undefined, value, I32(0))
        return b.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(I32, self.lanes), [0] * self.lanes))

    def _task(self) -> ir.Function:
        """What each thread does, with the product's ARGUMENTS.

        Rows are computed in blocks, as even as can be. The threads first share the blocks, to put the rows' values of
        one input feature side by side, and then the panels.
        """
        task = self._declare("task", VOID, [POINTER])
        b = ir.IRBuilder(task.append_basic_block())
        inputs, scratch, weights, bias, outputs, rows, in_features, panels = (
            b.load(b.gep(task.args[0], [I32(0), I32(i)], source_etype=ARGUMENTS), typ=kind)
            for i, kind in enumerate(ARGUMENTS.elements)
        )
        number = b.sext(b.call(self._declare("omp_get_thread_num", I32, []), []), I64)
        threads = b.sext(b.call(self._declare("omp_get_num_threads", I32, []), []), I64)
        blocks = b.sdiv(b.add(rows, I64(self.most_rows - 1)), I64(self.most_rows))

        def block_of(index: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
            """Its first row, its number of rows, its values in the order of the kernels."""
            first, last = _part(b, rows, blocks, index)
            return first, b.sub(last, first), _at(b, scratch, b.mul(first, in_features))

        # a single row's values are side by side
        with b.if_then(b.icmp_signed(">", rows, I64(1))):
            with _loop(b, *_part(b, blocks, threads, number)) as (index, _):
                first, count, ordered = block_of(index)
                with _loop(b, I64(0), in_features) as (feature, _), _loop(b, I64(0), count) as (row, _):
                    source = _at(b, inputs, b.add(b.mul(b.add(first, row), in_features), feature))
                    target = _at(b, ordered, b.add(b.mul(feature, count), row))
                    b.store(b.load(source, typ=FLOAT), target)
            b.call(self._declare("GOMP_barrier", VOID, []), [])

        width = 2 * self.lanes
        stride = b.mul(panels, I64(width))
        bytes_of_panel = b.mul(in_features, I64(width * self.dtype.itemsize))
        with _loop(b, *_part(b, panels, threads, number)) as (panel, _):
            column = b.mul(panel, I64(width))
            of_panel = _at(b, weights, b.mul(panel, bytes_of_panel), BYTE), _at(b, bias, column)
            with _loop(b, I64(0), blocks) as (index, _):
                first, count, ordered = block_of(index)
                place = _at(b, outputs, b.add(b.mul(first, stride), column))
                after = task.append_basic_block()
                choice = b.switch(count, after)
                for number_of_rows, kernel in self.kernels.items():
                    choice.add_case(I64(number_of_rows), case := task.append_basic_block())
                    b.position_at_end(case)
                    b.call(kernel, [ordered, *of_panel, place, in_features, stride])
                    b.branch(after)
                b.position_at_end(after)
        b.ret_void()
        return task

    def _product(self, task: ir.Function) -> None:
        product = self._declare("product", VOID, [*ARGUMENTS.elements, I32])
        b = ir.IRBuilder(product.append_basic_block())
        *values, threads = product.args
        arguments = b.alloca(ARGUMENTS)
        for i, value in enumerate(values):
            b.store(value, b.gep(arguments, [I32(0), I32(i)]))
        parallel = self._declare("GOMP_parallel", VOID, [task.type, arguments.type, I32, I32])
        b.call(parallel, [task, arguments, threads, I32(0)])
        b.ret_void()


def _at(b: ir.IRBuilder, pointer: ir.Value, index: ir.Value | int, kind: ir.Type = FLOAT) -> ir.Value:
    return b.gep(pointer, [I64(index) if isinstance(index, int) else index], source_etype=kind)


def _part(b: ir.IRBuilder, number: ir.Value, of: ir.Value, index: ir.Value) -> tuple[ir.Value, ir.Value]:
    """From where and up to where the part at `index` goes, of so many parts as even as can be."""
    return b.sdiv(b.mul(number, index), of), b.sdiv(b.mul(number, b.add(index, I64(1))), of)


@contextmanager
def _loop(
    b: ir.IRBuilder, start: ir.Value, stop: ir.Value, values: Sequence[ir.Value] = ()
) -> Iterator[tuple[ir.Value, list[ir.Value]]]:
    """The code within is run for each index from start up to stop. Yields the index, and the values that one turn
    leaves to the next: the code replaces them in the list, where their last ones are afterwards."""
    before = b.block
    head, body, after = (b.append_basic_block() for _ in range(3))
    b.branch(head)
    b.position_at_end(head)
    index, *carried = (b.phi(value.type) for value in (start, *values))
    b.cbranch(b.icmp_signed("<", index, stop), body, after)
    b.position_at_end(body)
    changing = list(carried)
    yield index, changing
    for phi, first, following in zip(
        (index, *carried), (start, *values), (b.add(index, I64(1)), *changing), strict=True
    ):
        phi.add_incoming(first, before)
        phi.add_incoming(following, b.block)
    b.branch(head)
    b.position_at_end(after)
    changing[:] = carried
