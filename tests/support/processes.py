"""The processes that a test starts, known by a mark in their environment, which their children inherit."""

import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psutil

FINALLY = 60
"""Seconds after which what a test waits for will not come."""


class Marked:
    """Put `environment` into what is started; then these are its processes, children and orphans included."""

    def __init__(self) -> None:
        self._mark = uuid.uuid4().hex
        self.environment = {"TEST_MARK": self._mark}

    def alive(self, command: str = "") -> list[psutil.Process]:
        """Those whose command line holds `command`. One that has ended, and waits for its parent to see it, is none."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process.environ().get("TEST_MARK") == self._mark and command in " ".join(process.cmdline()):
                    found.append(process)
        return found


def until(true: Callable[[], Any]) -> None:
    """Wait for it."""
    end = time.monotonic() + FINALLY
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)
