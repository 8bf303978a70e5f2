"""How a prediction learns that Cog cancelled it. Knows asyncio, nothing of requests."""

import asyncio
import inspect
from collections.abc import Callable


def on_cancel(call: Callable[[], object]) -> None:
    """Have Cog's cancelling of the prediction, whose coroutine runs now and is about to return, make this call.

    Cog (0.23) sends what an async generator yields only once it has ended, but streams the plain generator that a
    coroutine returns. It cancels by cancelling the future that run_coroutine_threadsafe gave it for the coroutine,
    and that one is done by then: so its `cancel` becomes ours. Nothing public leads from the task to its future.
    """
    task = asyncio.current_task()
    assert task is not None
    callback, _ = task._callbacks[0]
    inspect.getclosurevars(callback).nonlocals["destination"].cancel = call
