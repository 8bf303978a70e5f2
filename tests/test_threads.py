"""How many threads compute beside other programs."""

import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from llm.devices import cgroups, threads
from llm.devices.threads import Threads, use_physical_cores
from tests.support.cgroups import real_group, run_python, write_groups
from tests.support.processes import until

CORES = 4


class Processors:
    """A clock, and the processor time that other programs have taken, in seconds."""

    def __init__(self) -> None:
        self.time = 100.0
        self.others = 50.0

    def read(self) -> tuple[float, float]:
        return self.time, self.others

    def work(self, seconds: float, others: float) -> None:
        self.time += seconds
        self.others += others * seconds


@pytest.fixture
def processors(thread_count: None, monkeypatch: pytest.MonkeyPatch) -> Processors:
    processors = Processors()
    monkeypatch.setattr(threads, "_others", processors.read)
    monkeypatch.setattr(threads, "_allowed", lambda: set(range(CORES)))
    monkeypatch.setattr("psutil.cpu_count", lambda logical=True: CORES)
    monkeypatch.setattr("time.monotonic", lambda: processors.time)
    monkeypatch.setattr(cgroups, "processors", lambda: math.inf)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return processors


def test_there_are_as_many_threads_as_others_leave_processors(processors: Processors) -> None:
    pool = Threads()
    pool.ask(lambda most: True)
    for others, number in [(0, 4), (0.4, 4), (0.6, 3), (1, 3), (2.4, 2), (3.9, 1), (9, 1), (0.1, 4)]:
        processors.work(seconds=1, others=others)
        pool.fit()
        assert (pool.number, torch.get_num_threads()) == (number, number)


def test_a_moment_changes_nothing(processors: Processors) -> None:
    pool = Threads()
    pool.ask(lambda most: True)
    processors.work(seconds=0.1, others=4)
    pool.fit()
    assert pool.number == CORES
    processors.work(seconds=0.9, others=0)
    pool.fit()
    assert pool.number == CORES


def test_a_number_of_threads_that_changes_bits_is_never_used(processors: Processors) -> None:
    pool = Threads()
    pool.ask(lambda most: torch.get_num_threads() != 3 and most == CORES)
    for others, number in [(1, 2), (2, 2), (3, 1), (0, 4)]:
        processors.work(seconds=1, others=others)
        pool.fit()
        assert (pool.number, torch.get_num_threads()) == (number, number)


def test_where_every_smaller_number_changes_bits_all_threads_are_used(processors: Processors) -> None:
    pool = Threads()
    pool.ask(lambda most: False)
    processors.work(seconds=1, others=3)
    pool.fit()
    assert (pool.number, torch.get_num_threads()) == (CORES, CORES)


def test_of_many_processors_only_some_numbers_are_used(processors: Processors, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_allowed", lambda: set(range(16)))
    monkeypatch.setattr("psutil.cpu_count", lambda logical=True: 16)
    pool = Threads()
    pool.ask(lambda most: True)
    for others, number in [(1, 15), (2, 8), (8, 8), (9, 4), (12, 4), (13, 2), (15, 1), (0, 16)]:
        processors.work(seconds=1, others=others)
        pool.fit()
        assert pool.number == number


# What the process may use


@pytest.mark.parametrize(
    ("cores", "quota", "setting", "number"),
    [
        (4, math.inf, None, 4),
        # two processors on each core
        (2, math.inf, None, 2),
        (None, math.inf, None, 4),
        (4, 2.0, None, 2),
        (4, 2.9, None, 2),
        (4, 0.5, None, 1),
        (2, 64.0, None, 2),
        (4, math.inf, "1", 1),
        (4, math.inf, " 3 ", 3),
        (4, math.inf, "3,2", 3),
        (2, math.inf, "4", 4),
        (4, math.inf, "64", 4),
        (4, 2.0, "3", 2),
        (4, 2.0, "1", 1),
        *((4, math.inf, nonsense, 4) for nonsense in ("", "0", "-1", "x", "2x", "2.5", ",2", "2,", "2,x", "1 2")),
    ],
)
def test_there_are_no_more_threads_than_the_process_may_use(
    processors: Processors,
    monkeypatch: pytest.MonkeyPatch,
    cores: int | None,
    quota: float,
    setting: str | None,
    number: int,
) -> None:
    monkeypatch.setattr("psutil.cpu_count", lambda logical=True: CORES if logical else cores)
    monkeypatch.setattr(cgroups, "processors", lambda: quota)
    if setting is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", setting)
    assert (use_physical_cores(), torch.get_num_threads()) == (number, number)
    pool = Threads()
    pool.ask(lambda most: True)
    for others, left in [(0, number), (CORES - 1, 1), (0, number)]:
        processors.work(seconds=1, others=others)
        pool.fit()
        assert (pool.number, torch.get_num_threads()) == (left, left)


V1 = "/ /sys/fs/cgroup/cpu,cpuacct cgroup cpu,cpuacct"
V2 = "/ /sys/fs/cgroup cgroup2 rw"


def v1(folder: str, quota: int, period: int = 100_000) -> dict[str, str]:
    folder = f"/sys/fs/cgroup/cpu,cpuacct{folder}"
    return {f"{folder}/cpu.cfs_quota_us": str(quota), f"{folder}/cpu.cfs_period_us": str(period)}


@pytest.mark.parametrize(
    ("groups", "mounts", "files", "processors"),
    [
        ("0::/", V2, {"/sys/fs/cgroup/cpu.max": "200000 100000"}, 2),
        ("0::/", V2, {"/sys/fs/cgroup/cpu.max": "75000 50000"}, 1.5),
        ("0::/", V2, {"/sys/fs/cgroup/cpu.max": "max 100000"}, math.inf),
        (
            "0::/a/b",
            V2,
            {"/sys/fs/cgroup/a/b/cpu.max": "max 100000", "/sys/fs/cgroup/a/cpu.max": "300000 100000"},
            3,
        ),
        (
            "0::/a/b",
            V2,
            {"/sys/fs/cgroup/a/b/cpu.max": "200000 100000", "/sys/fs/cgroup/a/cpu.max": "300000 100000"},
            2,
        ),
        ("4:cpu,cpuacct:/docker/x\n0::/", V1, v1("/docker/x", 200_000), 2),
        ("4:cpu,cpuacct:/docker/x", V1, v1("/docker/x", -1), math.inf),
        ("4:cpu,cpuacct:/docker/x", V1, v1("/docker/x", -1) | v1("", 100_000), 1),
        ("4:cpu,cpuacct:/docker/x", V1.replace("/ ", "/docker/x ", 1), v1("", 50_000), 0.5),
        ("4:cpuset:/", V1, v1("", 100_000), math.inf),
        ("0::/", V2, {}, math.inf),
        (None, "", {}, math.inf),
    ],
)
def test_the_tightest_quota_counts(
    tmp_path: Path, groups: str | None, mounts: str, files: dict[str, str], processors: float
) -> None:
    assert cgroups.processors(write_groups(tmp_path, groups, mounts, files)) == processors


def test_a_real_quota_counts() -> None:
    with real_group("cpu", {"cpu.max": "150000 100000", "cpu.cfs_quota_us": "150000"}) as group:
        # the module alone: its package imports torch
        program = "import runpy; print(runpy.run_path('llm/devices/cgroups.py')['processors']())"
        assert run_python(group, program) == "1.5"


# The measure of other programs

BUSY = """
zeros = open("/dev/zero", "rb", buffering=0)
while True:
    sum(range(20_000))
    zeros.read(1 << 22)
"""
"""Computes, in its own code and in the system's."""


@pytest.fixture
def core() -> Iterator[int]:
    """The one processor on which this thread may run."""
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("only Linux lets a process choose its processors")
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield min(before)
    os.sched_setaffinity(0, before)


def test_only_the_processors_allowed_count(core: int) -> None:
    assert threads._allowed() == {core}


def test_the_processor_time_of_others_is_measured(core: int) -> None:
    """A nice process that is busy on this processor, beside whatever else runs there."""
    with subprocess.Popen(["nice", "-n", "5", sys.executable, "-c", BUSY]) as process:
        try:
            busy = psutil.Process(process.pid)

            def computed() -> float:
                return sum(busy.cpu_times()[:2])

            start, own = time.monotonic(), time.process_time()
            (_, others), before = threads._others(), computed()
            # this process computes too, which does not count
            until(lambda: sum(range(300_000)) and min(busy.cpu_times()[:2]) > 0.2)
            expected = computed() - before
            measured = threads._others()[1] - others
            left = (time.monotonic() - start) - (time.process_time() - own)
        finally:
            process.kill()
    # the system counts in samples of a hundredth of a second
    assert 0.8 * expected <= measured <= left + 0.05
