"""How much memory this process may still take. Knows the system's limits; nothing of models."""

import math
import mmap
import resource
from pathlib import Path

import psutil

from llm.devices import cgroups
from llm.devices.cgroups import ROOT

STACK_BYTES = 32 * (8 << 20)
"""Of the threads that start later, one for each prediction: a limit on addresses counts a stack whole, used or not."""


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
