"""The embedded model, where script/predict --demo has it: it is made once for all tests."""

import fcntl
from pathlib import Path

from cli import demo
from llm.weights.settings import Settings


def folder() -> Path:
    with Path(__file__).open() as this:
        # two processes test at once: the second one waits
        fcntl.flock(this, fcntl.LOCK_EX)
        return demo.ensure(Settings.read()).folder
