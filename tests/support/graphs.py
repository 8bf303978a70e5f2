"""A stand-in for CUDA's capture, on any machine."""

from collections.abc import Callable

from llm.devices.gpu import Replay


def plain_call(step: Callable[[], None]) -> Replay:
    """Buckets, order and reading one step late are as on a GPU; a graph is a plain call."""
    step()
    return step
