"""How a prediction learns that Cog cancelled it. Knows asyncio, nothing of requests."""

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any


@dataclass
class _Cancel:
    """What to call once the coroutine has returned."""

    call: Callable[[], object] = bool


_cancel: ContextVar[_Cancel] = ContextVar("cancel")


def follow_cancels(exception: type[BaseException]) -> None:
    """Have `on_cancel` work in what Cog runs from now on; `exception` is what it raises in a thread to cancel.

    What Cog (0.23, coglet's worker_bridge.rs) does: it submits predict()'s coroutine by run_coroutine_threadsafe and
    waits for its future in a thread. If the result is a plain generator, it is streamed from there; what an async
    generator yields is sent only once that has ended. To cancel, Cog calls the future's `cancel`, which does nothing
    by then. Before it has the future it raises `exception` in the thread that submits or waits, and takes that for a
    failure unless the text says otherwise. A cancel that comes before the thread has begun is lost.
    """
    try:
        exception.__str__ = lambda self: "cancelled"  # type: ignore[method-assign]
    except TypeError:
        _say_that_cog_is_another()
    submit = asyncio.run_coroutine_threadsafe

    def submit_cancellable(coroutine: Coroutine[Any, Any, object], loop: asyncio.AbstractEventLoop) -> Future[object]:
        cancel = _Cancel()

        async def run() -> object:
            _cancel.set(cancel)
            return await coroutine

        try:
            future = submit(run(), loop)
        except exception:
            # if the coroutine runs all the same, nobody has its result, which ends with that
            future = Future()
            future.cancel()
            return future
        cancel_coroutine = future.cancel
        future.cancel = lambda: cancel_coroutine() or cancel.call()  # type: ignore
        return future

    asyncio.run_coroutine_threadsafe = submit_cancellable  # type: ignore[assignment]


def on_cancel(call: Callable[[], object]) -> None:
    """Have Cog's cancelling of the prediction, whose coroutine runs now and is about to return, make this call.

    Where Cog has not submitted it as it used to, it goes on without, and the log says so once.
    """
    if cancel := _cancel.get(None):
        cancel.call = call
    else:
        _say_that_cog_is_another()


@cache
def _say_that_cog_is_another() -> None:
    print("Esta versión de Cog cancela de otro modo, quizá solo al acabar: use la de requirements.txt")
