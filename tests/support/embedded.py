"""The embedded model, in the folder of script/predict --demo, which is made once for all tests."""

import fcntl
from pathlib import Path

from cli import demo
from llm.weights.settings import Settings


def folder() -> Path:
    with Path(__file__).open() as lock:
        # tests run in two processes: the second waits for the first
        fcntl.flock(lock, fcntl.LOCK_EX)
        return demo.ensure(Settings.read()).folder
