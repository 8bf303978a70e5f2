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

    def __init__(self) -> None:
        """For the thread that makes it."""
        self.most = use_physical_cores()
        self.number = self.most
        self._numbers = [self.most]
        self._last = _others()

    def ask(self, agrees: Callable[[int], bool]) -> None:
        """Learn which smaller numbers of threads may be taken: one less, and halves. The others would take too long.

        agrees: whether as many threads as there are when it is called give the same bits as so many.
        """
        for number in sorted({max(1, self.most - 1), *(self.most >> i for i in range(1, self.most.bit_length()))}):
            torch.set_num_threads(number)
            if number < self.most and agrees(self.most):
                self._numbers.append(number)
        torch.set_num_threads(self.number)

    def fit(self) -> None:
        """Between two steps: choose anew, if it is time."""
        if time.monotonic() - self._last[0] < INTERVAL:
            return
        (start, before), self._last = self._last, _others()
        end, computed = self._last
        self.take(len(_allowed()) - round((computed - before) / (end - start)))

    def take(self, number: int) -> None:
        """Compute with so many threads, or with the next number of those that give the same bits."""
        fewer = [asked for asked in self._numbers if asked <= number]
        self.number = max(fewer) if fewer else min(self._numbers)
        torch.set_num_threads(self.number)


def _others() -> tuple[float, float]:
    """In seconds: what time it is, and how long other programs have computed on the processors allowed."""
    allowed = _allowed()
    times = [times for number, times in enumerate(psutil.cpu_times(percpu=True)) if number in allowed]
    return time.monotonic(), sum(t.user + t.nice + t.system for t in times) - time.process_time()
