"""Activation functions for the CPU, batch-invariant: an element's bits do not depend on where threads cut the tensor.

Torch computes the elements of a thread in whole vectors and the rest one by one, in some functions with other
instructions: of a tensor that no thread cuts within a vector, no element is such a rest.
"""

import inspect
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2CLS

VECTOR = 64
"""Elements that torch computes in one turn: two registers of 32 bfloat16, and a multiple of all else."""
GRAIN = 32768
"""Elements for one thread at the least, in most functions; in GELU all threads share any tensor of more than 20,000."""

CLASSES = {cls for value in ACT2CLS.values() if inspect.isclass(cls := value[0] if isinstance(value, tuple) else value)}


class BatchInvariantActivation(nn.Module):
    """An activation function that computes a tensor's elements in whole vectors, on each thread."""

    def __init__(self, function: nn.Module):
        super().__init__()
        self.function = function
        self._missing: dict[tuple[int, int], int] = {}

    def forward(self, x: Tensor) -> Tensor:
        key = x.numel(), torch.get_num_threads()
        if key not in self._missing:
            self._missing[key] = _missing(*key)
        missing = self._missing[key]
        result: Tensor
        if not missing:
            result = self.function(x.contiguous())
            return result
        result = self.function(F.pad(x.reshape(-1), (0, missing)))
        return result[:-missing].view(x.shape)


def replace(network: nn.Module) -> None:
    """Make a network's activation functions batch-invariant, in place."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if type(child) in CLASSES and not isinstance(module, BatchInvariantActivation):
                setattr(module, name, BatchInvariantActivation(child))


def _missing(elements: int, threads: int) -> int:
    """How many elements a tensor lacks until all threads that share it compute whole vectors."""
    padded = elements
    while padded % (unit := VECTOR * math.lcm(threads, min(threads, max(1, -(-padded // GRAIN))))):
        padded += -padded % unit
    return padded - elements
