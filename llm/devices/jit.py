"""What the kernels for an x86 processor are written with. LLVM compiles them, when they are first asked for, for the
processor at hand; torch's own threads run them."""

import ctypes
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import llvmlite.binding as llvm
from llvmlite import ir

from llm.devices import processor

VOID, BYTE, I32, I64 = ir.VoidType(), ir.IntType(8), ir.IntType(32), ir.IntType(64)
FLOAT, HALF = ir.FloatType(), ir.HalfType()
POINTER = ir.PointerType()

AS_ARGUMENT = {POINTER: ctypes.c_void_p, I64: ctypes.c_int64, FLOAT: ctypes.c_float}


class Kernel:
    """Compiled code. Called with pointers and numbers, and the number of threads."""

    def __init__(self, engine: llvm.ExecutionEngine, stage: ir.FunctionType):
        self._engine = engine  # the code is freed with it
        self.stage = engine.get_function_address("stage"), stage
        """Where the code of one thread is, for another kernel, which gives each thread's number and their number."""
        kinds = (AS_ARGUMENT[kind] for kind in stage.args[2:])
        self._run: Callable[..., None] = ctypes.CFUNCTYPE(None, *kinds, ctypes.c_int64)(
            engine.get_function_address("run")
        )

    def __call__(self, *arguments: float) -> None:
        self._run(*arguments)


# Of exp, from Cephes (S. Moshier): ln 2 in two parts, and the polynomial's coefficients from the highest power on.
LN2 = 0.693359375, -2.12194440e-4
POLYNOMIAL = 1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1
LEAST = -87.0
"""Below it, exp is 0."""


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

    def exp(self, b: ir.IRBuilder, x: ir.Value) -> ir.Value:
        """exp of values up to 0, within two units in the last place."""
        bounded = b.select(b.fcmp_ordered(">", x, self.constant(LEAST)), x, self.constant(LEAST))
        rint = self.function(f"llvm.rint.v{self.lanes}f32", self.vector, [self.vector])
        power = b.call(rint, [b.fmul(bounded, self.constant(1 / math.log(2)))])
        rest = bounded
        for part_of_ln2 in LN2:
            rest = self.multiply_add(b, power, self.constant(-part_of_ln2), rest)
        result = self.constant(POLYNOMIAL[0])
        for coefficient in POLYNOMIAL[1:]:
            result = self.multiply_add(b, result, rest, self.constant(coefficient))
        result = b.fadd(self.multiply_add(b, result, b.fmul(rest, rest), rest), self.constant(1))
        integers = ir.VectorType(I32, self.lanes)
        exponent = b.shl(b.fptosi(power, integers), ir.Constant(integers, [23] * self.lanes))
        result = b.bitcast(b.add(b.bitcast(result, integers), exponent), self.vector)
        # a NaN stays one
        without = b.select(b.fcmp_ordered("<=", x, self.constant(LEAST)), self.constant(0), x)
        return b.select(b.fcmp_ordered(">", x, self.constant(LEAST)), result, without)

    def constant(self, value: float) -> ir.Constant:
        """A vector of it, rounded to float32."""
        return ir.Constant(self.vector, [ctypes.c_float(value).value] * self.lanes)

    def reduced(self, b: ir.IRBuilder, operation: str, vector: ir.Value) -> ir.Value:
        """The sum of a vector's values, two by two, or the largest."""
        name = f"llvm.vector.reduce.{operation}.v{self.lanes}f32"
        if operation == "fmax":
            return b.call(self.function(name, FLOAT, [self.vector]), [vector])
        # the order is the processor's: the same for each vector
        function = self.function(name, FLOAT, [FLOAT, self.vector])
        return b.call(function, [ir.Constant(FLOAT, -0.0), vector], fastmath=("reassoc",))

    def call(self, b: ir.IRBuilder, kernel: Kernel, *arguments: ir.Value) -> None:
        """Have this thread run another kernel's stage: its number and the number of threads come first."""
        address, stage = kernel.stage
        b.call(b.inttoptr(I64(address), stage.as_pointer()), arguments)

    def barrier(self, b: ir.IRBuilder) -> None:
        """Wait for all threads."""
        b.call(self.function("GOMP_barrier", VOID, []), [])

    def parallel(self, arguments: Sequence[ir.Type], write: Callable[..., None]) -> None:
        """The functions "stage", which is what `write` writes, and "run", which starts threads that run it.

        write: called with a builder, the thread's number, the number of threads and the arguments.
        """
        stage = self.function("stage", VOID, [I64, I64, *arguments])
        b = ir.IRBuilder(stage.append_basic_block())
        write(b, *stage.args)
        b.ret_void()

        struct = ir.LiteralStructType(arguments)
        task = self.function("task", VOID, [struct.as_pointer()])
        b = ir.IRBuilder(task.append_basic_block())
        numbers = (
            b.sext(b.call(self.function(f"omp_get_{name}", I32, []), []), I64) for name in ("thread_num", "num_threads")
        )
        fields = [b.load(b.gep(task.args[0], [I32(0), I32(i)]), typ=kind) for i, kind in enumerate(arguments)]
        b.call(stage, [*numbers, *fields])
        b.ret_void()

        run = self.function("run", VOID, [*arguments, I64])
        b = ir.IRBuilder(run.append_basic_block())
        values = b.alloca(struct)
        for i, value in enumerate(run.args[:-1]):
            b.store(value, b.gep(values, [I32(0), I32(i)]))
        start = self.function("GOMP_parallel", VOID, [task.type, values.type, I32, I32])
        b.call(start, [task, values, b.trunc(run.args[-1], I32), I32(0)])
        b.ret_void()

    def compiled(self) -> Kernel:
        """It takes a tenth of a second."""
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        llvm.load_library_permanently(processor.openmp())
        machine = llvm.Target.from_default_triple().create_target_machine(
            llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten(), opt=3, jit=True
        )
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly(str(self.module)), machine)
        engine.finalize_object()
        return Kernel(engine, self._functions["stage"].function_type)


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
