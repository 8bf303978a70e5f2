"""A lack of memory, as torch and the libraries below it report it; memory that is given back."""

import ctypes
import sys

import torch

_ALLOCATORS = ("DefaultCPUAllocator: ", "MPS backend out of memory", "could not create a memory object")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _ALLOCATORS)


def trim() -> None:
    """Give freed memory back to the system, where the C library keeps it for later (glibc)."""
    if sys.platform == "linux" and (malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        malloc_trim(ctypes.c_size_t(0))
