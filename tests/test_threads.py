"""How many threads compute beside other programs."""

import pytest
import torch

from llm.devices import threads
from llm.devices.threads import Threads

CORES = 4


class Processors:
    """Those that this process may run on, and what is read of them: `others` of them are busy with other programs."""

    def __init__(self) -> None:
        self.time = 100.0
        self.all = 50.0
        self.own = 10.0

    def read(self) -> tuple[float, float, float]:
        return self.time, self.all, self.own

    def work(self, seconds: float, others: float, own: float = CORES / 2) -> None:
        self.time += seconds
        self.all += (others + own) * seconds
        self.own += own * seconds


@pytest.fixture
def processors(thread_count: None, monkeypatch: pytest.MonkeyPatch) -> Processors:
    processors = Processors()
    monkeypatch.setattr(threads, "_used", processors.read)
    monkeypatch.setattr(threads, "_allowed", lambda: set(range(CORES)))
    monkeypatch.setattr("psutil.cpu_count", lambda logical=True: CORES)
    monkeypatch.setattr("time.monotonic", lambda: processors.time)
    return processors


def test_there_are_as_many_as_others_leave_processors_for(processors: Processors) -> None:
    fitted = Threads(keeps_bits=lambda most: True)
    for others, number in [(0, 4), (0.4, 4), (0.6, 3), (1, 3), (2.4, 2), (3.9, 1), (9, 1), (0.1, 4)]:
        processors.work(seconds=1, others=others)
        fitted.fit()
        assert (fitted.number, torch.get_num_threads()) == (number, number)


def test_a_moment_says_nothing(processors: Processors) -> None:
    fitted = Threads(keeps_bits=lambda most: True)
    processors.work(seconds=0.1, others=4)
    fitted.fit()
    assert fitted.number == CORES
    processors.work(seconds=0.9, others=0)
    fitted.fit()
    assert fitted.number == CORES


def test_a_number_that_changes_bits_is_asked_once_and_never_taken(processors: Processors) -> None:
    asked = []

    def keeps_bits(most: int) -> bool:
        asked.append((torch.get_num_threads(), most))
        return torch.get_num_threads() != 3

    fitted = Threads(keeps_bits)
    for others, number in [(1, 4), (1, 4), (2, 2), (1, 2), (2, 2), (0, 4)]:
        processors.work(seconds=1, others=others)
        fitted.fit()
        assert (fitted.number, torch.get_num_threads()) == (number, number)
    assert asked == [(3, CORES), (2, CORES)]
