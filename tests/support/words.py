"""predict.py without a model: its inputs and its way to end, with words in place of an answer.

For tests of what stands around a server and does not look at texts: it is ready in a moment, and computes nothing.
"""

from pathlib import Path

from llm.weights.settings import ROOT

SETUP = "follow_cancels(cog.CancelationException)"

_BEGINNING = f"""\
import contextvars
import threading
import time
from collections.abc import Iterator
from typing import Optional

import cog
from cog import AsyncConcatenateIterator, BasePredictor, Input, streaming

from llm.cancellation import follow_cancels, on_cancel
from llm.errors import UserError


class Predictor(BasePredictor):
    def setup(self) -> None:
        {SETUP}

"""
_BODY = """\
        cancelled = threading.Event()
        on_cancel(cancelled.set)
        prediction = contextvars.copy_context()

        def words() -> Iterator[str]:
            for number in range(int(max_tokens)):
                if cancelled.wait(SECONDS):
                    return
                yield f"{number} "
            prediction.run(self.record_metric, "time_to_first_token", SECONDS)

        return words()
"""


def source(seconds: float = 0.01) -> str:
    """The text of a predict.py with the inputs of ours, and so many seconds for each word."""
    ours = (ROOT / "predict.py").read_text(encoding="utf-8")
    docstring = '        """Responde a una pregunta, palabra a palabra."""\n'
    inputs, separator, _ = ours[ours.index("    @streaming\n") :].partition(docstring)
    assert separator
    return _BEGINNING + inputs + docstring + _BODY.replace("SECONDS", str(seconds))


def write(folder: Path, seconds: float = 0.01) -> dict[str, str]:
    """Put that predict.py into the folder; the variables with which a server runs it there."""
    (folder / "predict.py").write_text(source(seconds), encoding="utf-8")
    return {"PYTHONPATH": str(ROOT)}
