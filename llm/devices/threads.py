"""How many threads compute on a CPU. Knows the system's processors; nothing of models, nothing of steps."""

import math
import os
import time
from collections.abc import Callable

import psutil
import torch

from llm.devices import cgroups
from llm.weights import settings

INTERVAL = 0.5
"""Seconds over which the use of the processors is looked at. The system counts it in hundredths."""


def use_physical_cores() -> int:
    """One thread for each physical core that this process may run on: two on one core compete for its units.

    OMP_NUM_THREADS, where the user sets it, takes the place of the cores. Neither goes beyond the processors that the
    process may use.
    """
    allowed = len(_allowed())
    # Part of a processor is left to the server: a thread that has to stop when the quota is used up, with the weights
    # half read, stops all the others, which wait for it.
    quota = max(1, math.floor(min(allowed, cgroups.processors())))
    threads = min(quota, settings.openmp_threads() or psutil.cpu_count(logical=False) or allowed)
    torch.set_num_threads(threads)
    return threads


def _allowed() -> set[int]:
    """The processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(psutil.cpu_count() or 1))


class Threads:
    """As many threads as other programs leave processors for.

    At every operation threads wait for each other: where another program has the core of one, all go at its speed, or
    slower. With one busy process on two cores, a single thread keeps more of the speed than two.
    """

    def __init__(self, keeps_bits: Callable[[int], bool]):
        """For the thread that makes it. keeps_bits: whether as many threads as there are when it is called give the
        same bits as so many; asked once of each number."""
        self.most = use_physical_cores()
        self.number = self.most
        self._keeps_bits = keeps_bits
        self._asked = {self.most: True}
        self._last = _others()

    def fit(self) -> None:
        """Between two steps: choose anew, if it is time."""
        if time.monotonic() - self._last[0] < INTERVAL:
            return
        (start, before), self._last = self._last, _others()
        end, computed = self._last
        self.take(min(self.most, max(1, len(_allowed()) - round((computed - before) / (end - start)))))

    def take(self, number: int) -> None:
        """Compute with so many, if they keep the bits."""
        if number not in self._asked:
            torch.set_num_threads(number)
            self._asked[number] = self._keeps_bits(self.most)
        if self._asked[number]:
            self.number = number
        torch.set_num_threads(self.number)


def _others() -> tuple[float, float]:
    """In seconds: what time it is, and how long other programs have computed on the processors allowed."""
    allowed = _allowed()
    times = [times for number, times in enumerate(psutil.cpu_times(percpu=True)) if number in allowed]
    return time.monotonic(), sum(t.user + t.nice + t.system for t in times) - time.process_time()
