"""What this machine's processor can do."""

import functools
import re
import sys
from pathlib import Path

BFLOAT16 = {"avx512_bf16", "amx_bf16"}
"""Instructions, one of which is enough."""
KERNELS = {"avx2", "fma", "f16c"}
"""Instructions, all of which the kernels of this project need."""


def computes_bfloat16() -> bool:
    return not BFLOAT16.isdisjoint(flags())


@functools.cache
def runs_kernels() -> bool:
    """Whether it can run what jit.py compiles."""
    return sys.platform == "linux" and flags() >= KERNELS and openmp() is not None


def flags() -> set[str]:
    """What /proc/cpuinfo says; nothing where there is none, as on macOS."""
    cpuinfo = Path("/proc/cpuinfo")
    return set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()


def openmp() -> str | None:
    """The library of torch's threads, where it is GNU's."""
    library = re.search(r"\S*/libgomp\S*", Path("/proc/self/maps").read_text())
    return library[0] if library else None
