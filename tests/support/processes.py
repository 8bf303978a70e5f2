"""The processes that a test starts, known by a mark in their environment, which their children inherit."""

import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psutil

FINALLY = 60
"""The most seconds that a test waits for anything."""


class Marked:
    """The processes that were started with `environment`, their children and orphans included."""

    def __init__(self) -> None:
        self._mark = uuid.uuid4().hex
        # a system rounds the times at which processes start
        self._began = time.time() - 5
        self.environment = {"TEST_MARK": self._mark}

    def alive(self, command: str = "") -> list[psutil.Process]:
        """Those whose command line contains `command`, without zombies."""
        alive = []
        for process in psutil.process_iter():
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                # known once it has been asked for; a process's environment is read anew each time
                if process.create_time() < self._began:
                    continue
                if process.environ().get("TEST_MARK") == self._mark and command in " ".join(process.cmdline()):
                    alive.append(process)
        return alive


def until(condition: Callable[[], Any]) -> None:
    """Wait until the condition holds."""
    end = time.monotonic() + FINALLY
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
