"""What the kernels for an x86 processor are written with. LLVM compiles them, when they are first asked for, for the
processor at hand; torch's own threads run them."""

import ctypes
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir

from llm.devices import processor

VOID, BYTE, I32, I64 = ir.VoidType(), ir.IntType(8), ir.IntType(32), ir.IntType(64)
FLOAT, HALF = ir.FloatType(), ir.HalfType()
POINTER = ir.PointerType()

AS_ARGUMENT = {POINTER: ctypes.c_void_p, I64: ctypes.c_int64, FLOAT: ctypes.c_float}


@functools.cache
def lanes() -> int:
    """How many float32 a vector of the processor holds."""
    return 16 if llvm.get_host_cpu_features().get("avx512f") else 8


class Code:
    """A module of LLVM's, with one function that Python calls and all threads run."""

    def __init__(self, lanes: int):
        self.lanes = lanes
        self.vector = ir.VectorType(FLOAT, lanes)
        self.module = ir.Module()
        self.module.triple = llvm.get_process_triple()
        self._functions: dict[str, ir.Function] = {}

    def function(self, name: str, result: ir.Type, arguments: Sequence[ir.Type]) -> ir.Function:
        """The one of this name: of this module, of LLVM itself or of OpenMP."""
        if name not in self._functions:
            self._functions[name] = ir.Function(self.module, ir.FunctionType(result, arguments), name)
        return self._functions[name]

    def multiply_add(self, b: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
        """x * y + z, rounded once."""
        name = f"llvm.fma.v{self.lanes}f32" if x.type == self.vector else "llvm.fma.f32"
        return b.call(self.function(name, x.type, [x.type] * 3), [x, y, z])

    def repeated(self, b: ir.IRBuilder, value: ir.Value) -> ir.Value:
        """A vector of one value."""
        undefined = ir.Constant(ir.VectorType(value.type, self.lanes), ir.Undefined)
        first = b.insert_element(undefined, value, I32(0))
        return b.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(I32, self.lanes), [0] * self.lanes))

    def load(self, b: ir.IRBuilder, pointer: ir.Value, index: ir.Value | int = 0) -> ir.Value:
        """The vector from the float at an index on."""
        return b.load(at(b, pointer, index), typ=self.vector, align=4)

    def parallel(self, arguments: Sequence[ir.Type], write: Callable[..., None]) -> None:
        """The function "run", with these arguments and a number of threads, each of which runs what `write` writes.

        write: called with a builder, the thread's number, the number of threads and the arguments.
        """
        struct = ir.LiteralStructType(arguments)
        task = self.function("task", VOID, [struct.as_pointer()])
        b = ir.IRBuilder(task.append_basic_block())
        number, threads = (
            b.sext(b.call(self.function(f"omp_get_{name}", I32, []), []), I64) for name in ("thread_num", "num_threads")
        )
        fields = [b.load(b.gep(task.args[0], [I32(0), I32(i)]), typ=kind) for i, kind in enumerate(arguments)]
        write(b, number, threads, *fields)
        b.ret_void()

        run = self.function("run", VOID, [*arguments, I64])
        b = ir.IRBuilder(run.append_basic_block())
        values = b.alloca(struct)
        for i, value in enumerate(run.args[:-1]):
            b.store(value, b.gep(values, [I32(0), I32(i)]))
        start = self.function("GOMP_parallel", VOID, [task.type, values.type, I32, I32])
        b.call(start, [task, values, b.trunc(run.args[-1], I32), I32(0)])
        b.ret_void()

    def compiled(self) -> Any:
        """The function "run", for ctypes: it takes a tenth of a second."""
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        llvm.load_library_permanently(processor.openmp())
        machine = llvm.Target.from_default_triple().create_target_machine(
            llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten(), opt=3, jit=True
        )
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly(str(self.module)), machine)
        engine.finalize_object()
        arguments = (AS_ARGUMENT[argument.type] for argument in self._functions["run"].args)
        run: Any = ctypes.CFUNCTYPE(None, *arguments)(engine.get_function_address("run"))
        run.engine = engine  # the code is freed with it
        return run


def at(b: ir.IRBuilder, pointer: ir.Value, index: ir.Value | int, kind: ir.Type = FLOAT) -> ir.Value:
    """Where the value at an index is, of an array at a pointer."""
    return b.gep(pointer, [I64(index) if isinstance(index, int) else index], source_etype=kind)


def part(b: ir.IRBuilder, number: ir.Value, of: ir.Value, index: ir.Value) -> tuple[ir.Value, ir.Value]:
    """From where and up to where the part at an index goes, if a number is divided as evenly as can be."""
    return b.sdiv(b.mul(number, index), of), b.sdiv(b.mul(number, b.add(index, I64(1))), of)


@contextmanager
def loop(
    b: ir.IRBuilder, start: ir.Value, stop: ir.Value, values: Sequence[ir.Value] = ()
) -> Iterator[tuple[ir.Value, list[ir.Value]]]:
    """What is written within runs for each index from start up to stop. Yields the index, and the values that one turn
    leaves to the next: whoever writes replaces them in the list, which afterwards has their last ones."""
    before = b.block
    head, body, after = (b.append_basic_block() for _ in range(3))
    b.branch(head)
    b.position_at_end(head)
    index, *carried = (b.phi(value.type) for value in (start, *values))
    b.cbranch(b.icmp_signed("<", index, stop), body, after)
    b.position_at_end(body)
    changing = list(carried)
    yield index, changing
    following = b.add(index, I64(1)), *changing
    for phi, first, next_one in zip((index, *carried), (start, *values), following, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(next_one, b.block)
    b.branch(head)
    b.position_at_end(after)
    changing[:] = carried
