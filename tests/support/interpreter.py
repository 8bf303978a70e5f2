"""What Triton's interpreter lacks, which runs kernels on a CPU's tensors: see conftest.py. Skips the tests that import
this where it does not run."""

import os
from typing import Any

import numpy as np
import pytest

if "TRITON_INTERPRET" not in os.environ:
    pytest.skip("with a GPU, script/test -m gpu shows it", allow_module_level=True)
tl = pytest.importorskip("triton.language", reason="triton comes with the package registry's torch, on Linux")
interpreter = pytest.importorskip("triton.runtime.interpreter")


def _products_of_bfloat16() -> None:
    """The interpreter holds bfloat16 numbers as 16 bits, and would multiply them as integers."""
    create_dot = interpreter.InterpreterBuilder.create_dot

    def float32(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        numbers = (handle.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(numbers, tl.float32)

    def create_dot_of_floats(builder: Any, a: Any, b: Any, *arguments: Any) -> Any:
        return create_dot(builder, float32(a), float32(b), *arguments)

    interpreter.InterpreterBuilder.create_dot = create_dot_of_floats


def sum_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have products sum one in feature after the other: numpy's sums are in another order for more rows."""

    def matmul(a: Any, b: Any, dtype: Any) -> Any:
        sums = np.zeros((*a.shape[:-1], b.shape[-1]), np.float32)
        for k in range(a.shape[-1]):
            sums += a[..., k, None].astype(np.float32) * b[..., k, None, :].astype(np.float32)
        return sums

    monkeypatch.setattr(np, "matmul", matmul)


_products_of_bfloat16()
