"""How much memory this process may still take, whether an allocation failed, memory that is given back.

Knows the system's limits and what libraries say; nothing of models.
"""

import ctypes
import errno
import math
import mmap
import resource
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from llm.devices import cgroups
from llm.devices.cgroups import ROOT

STACK_BYTES = 32 * (8 << 20)
"""Of the threads that start later, one for each prediction: a limit on addresses counts a stack whole, used or not."""

# What torch, cuBLAS, the C++ library, the system's loader, Python (of a stack, and where no memory was left for a
# MemoryError) and transformers say where there is no errno.
_NO_MEMORY = (
    "out of memory",
    "allocate memory",
    "not enough memory",
    "alloc_failed",
    "bad_alloc",
    "failed to map segment",
    "can't start new thread",
    "without exception set",
    "without setting an exception",
    "offload_folder",
)


def available(root: Path = ROOT) -> int:
    """In bytes: the least of the machine's free memory, the control groups' and the address space (`ulimit -v`, `-d`).

    `root` stands for /, for tests.
    """
    return max(0, int(min(psutil.virtual_memory().available, cgroups.memory_left(root), _address_space(root))))


def _address_space(root: Path) -> float:
    statm = root / "proc/self/statm"
    # macOS accepts these limits and does not hold them
    if not statm.exists():
        return math.inf
    pages = [int(number) for number in statm.read_text().split()]
    taken = {resource.RLIMIT_AS: pages[0], resource.RLIMIT_DATA: pages[5]}
    limits = {kind: resource.getrlimit(kind)[0] for kind in taken}
    return min(
        (
            limit - taken[kind] * mmap.PAGESIZE - STACK_BYTES
            for kind, limit in limits.items()
            if limit != resource.RLIM_INFINITY
        ),
        default=math.inf,
    )


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, on a GPU or on the host."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    return any(words in str(error).lower() for words in _NO_MEMORY)


def empty_cuda_cache() -> None:
    """Give the memory that torch keeps for later back to the GPUs, where torch does: until 2.12 it raises an error here
    once a capture has failed (pytorch#180395). What is wrong with a device, its next operation says too."""
    with suppress(RuntimeError):
        torch.cuda.empty_cache()


def trim() -> None:
    """Give freed memory back to the system, where the C library keeps it for later (glibc)."""
    if sys.platform == "linux" and (malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        malloc_trim(ctypes.c_size_t(0))
