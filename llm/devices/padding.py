"""To how many rows a layer for the CPU pads its input. Knows numbers of rows and a product; nothing of models."""

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor


class Layer(Protocol):
    buffer: Tensor
    """(rows, in features), of the dtype of its inputs."""

    def of_all(self, x: Tensor, bias: Tensor | None) -> Tensor: ...


class RowPadding:
    """To how many rows a layer pads its input, so that a row's bits do not depend on the number of rows.

    Where the processor's kernels sum in other orders for other numbers of rows, the input is padded to a number that
    agrees with a reference number. Which ones agree is asked of the processor, when they first come up.
    """

    def __init__(self, layer: Layer, numbers: tuple[int, ...], references: Iterable[int]):
        """layer: asked for all layers of its shape. numbers: candidates to pad to, from the fewest that a product
        computes. references: the first of them that gives all of its rows the same bits is the reference number."""
        self._layer = layer
        generator = torch.Generator().manual_seed(0)
        self._row = torch.randn(1, layer.buffer.shape[-1], generator=generator).to(layer.buffer.dtype)
        self._agreeing: dict[tuple[int, int], bool] = {}
        self._padded: dict[tuple[int, int], int] = {}
        """Both by rows and threads."""
        self.batch_invariant = any(map(self._is_reference, references))
        """Whether the processor gives a row the same bits at any place among some number of rows."""
        self.most = next(filter(self._agrees, reversed(numbers)), numbers[-1])
        self._numbers = tuple(number for number in numbers if number <= self.most)

    def __getitem__(self, rows: int) -> int:
        """For 1 <= rows <= most."""
        key = rows, torch.get_num_threads()
        if key not in self._padded:
            enough = [number for number in self._numbers if number >= rows]
            if self.batch_invariant:
                candidates = [rows, *enough] if rows >= self._numbers[0] else enough
                self._padded[key] = next(filter(self._agrees, candidates))
            else:
                self._padded[key] = enough[0]
        return self._padded[key]

    @staticmethod
    def for_all(paddings: Iterable["RowPadding"], rows: int) -> int:
        """The least number of rows, from `rows` on, that none of these pads; `rows` itself where there is none."""
        most = min((padding.most for padding in paddings), default=0)
        numbers = range(rows, most + 1)
        return next((n for n in numbers if all(padding[n] == n for padding in paddings)), rows)

    def agrees_now(self) -> bool:
        """Whether as many threads as there are now give the bits of the number of threads at start."""
        return self._agrees(self._numbers[0]) and self._agrees(self.most)

    def _is_reference(self, rows: int) -> bool:
        # minus the rounded product: what remains shows the bits of the sum that bfloat16 rounds away
        self._bias = -self._bits(rows, None)[0]
        self._expected = self._bits(rows, self._bias)[0]
        self._agreeing.clear()
        return self._agrees(rows)

    def _agrees(self, rows: int) -> bool:
        key = rows, torch.get_num_threads()
        if key not in self._agreeing:
            self._agreeing[key] = bool((self._bits(rows, self._bias) == self._expected).all())
        return self._agreeing[key]

    def _bits(self, rows: int, bias: Tensor | None) -> Tensor:
        return self._layer.of_all(self._row.expand(rows, -1).contiguous(), bias)
