"""Linear layers for the CPU: weights packed as the processor reads them fastest, and batch-invariant products.

How a product is summed, and so its last bits, may depend on how many rows are computed together. Packed layers pad
their input to numbers of rows for which the processor, asked at start, gives every row the same bits.
"""

import ctypes
import mmap
import sys
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm.devices import forward

FEWEST_ROWS = 4
"""Fewer are padded: oneDNN reads the weights a fifth faster for four rows than for one (Zen 4)."""
DECODE_ROWS = (FEWEST_ROWS, 8, 16, 32)
PREFILL_ROWS = (*DECODE_ROWS, 64, 128, 256)
"""What the rows of a decode pass and the tokens of a prefill pass are padded to, where they have to be."""
BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16"}


def computes_in_bfloat16() -> bool:
    """Whether the CPU has instructions for it; else it is slower in bfloat16 than in float32."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and not BFLOAT16_FLAGS.isdisjoint(cpuinfo.read_text().split())


class RowPadding:
    """To how many rows a packed layer pads its input, so that a row's bits do not depend on the number of rows.

    Where the processor's kernels sum in other orders for other numbers of rows, the input is padded to a number that
    agrees with a reference number. Which ones agree is asked of the processor: a few at start, others when they first
    come up.
    """

    def __init__(self, layer: "PackedLinear", numbers: tuple[int, ...], reference: int):
        """layer: asked for all layers of its shape; numbers: candidates to pad to, `reference` among them."""
        self._layer = layer
        self._row = torch.randn(1, layer.buffer.shape[-1], generator=torch.Generator().manual_seed(0)).bfloat16()
        # minus the rounded product: what remains shows the bits of the sum that bfloat16 rounds away
        self._bias = -self._bits(reference, None)[0]
        self._expected = self._bits(reference, self._bias)[0]
        agreeing = tuple(number for number in numbers if self._agrees(number))
        self.batch_invariant = reference in agreeing
        """Whether the processor gives a row the same bits at any place among some number of rows."""
        self._numbers = agreeing if self.batch_invariant else numbers
        self.most = self._numbers[-1]
        self._padded: dict[tuple[int, int], int] = {}
        """By rows and threads."""

    def __getitem__(self, rows: int) -> int:
        """For 1 <= rows <= most."""
        key = rows, torch.get_num_threads()
        if key not in self._padded:
            needs_none = rows >= FEWEST_ROWS and self._agrees(rows)
            self._padded[key] = rows if needs_none else next(number for number in self._numbers if number >= rows)
        return self._padded[key]

    def agrees_now(self) -> bool:
        """Whether as many threads as there are now give the bits of the number of threads at start."""
        return all(map(self._agrees, self._numbers))

    def _agrees(self, rows: int) -> bool:
        return bool((self._bits(rows, self._bias) == self._expected).all())

    def _bits(self, rows: int, bias: Tensor | None) -> Tensor:
        return self._layer.product(self._row.expand(rows, -1).contiguous(), bias)


class PackedLinear(nn.Module):
    """An nn.Linear whose weight is in oneDNN's blocked layout, about twice as fast to read for a few rows.

    The layer skips the padding of a prefill pass: prompts of different lengths cost no more than their tokens. It takes
    the weight from the module that it replaces: packing a model needs memory for its weights and one more layer.
    """

    decode: RowPadding
    """In a decode pass, and in the last layer of a prefill pass, which reads one token of each prompt."""
    prefill: RowPadding
    """In every other layer of a prefill pass."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.out_features = linear.out_features
        self.bias = linear.bias
        self.buffer = linear.weight.new_zeros(PREFILL_ROWS[-1], 1, linear.in_features)
        """Where rows are padded. The padding's values do not matter."""
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        del linear.weight

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in features) bfloat16. Returns (..., out features) bfloat16, 0 for padding."""
        tokens = x.numel() // x.shape[-1]
        pass_ = forward.current()
        if pass_ is None or tokens != pass_.tokens:
            return self._product(x, tokens, self.decode)
        indices = pass_.prompt_tokens
        if indices is None:
            return self._product(x, tokens, self.prefill)
        result = x.new_zeros(tokens, self.out_features)
        result[indices] = self._product(x.flatten(0, -2)[indices], len(indices), self.prefill)
        return result.view(*x.shape[:-1], -1)

    def _product(self, x: Tensor, rows: int, padding: RowPadding) -> Tensor:
        if rows > padding.most:
            parts = x.reshape(rows, -1).split(padding.most)
            return torch.cat([self._product(part, len(part), padding) for part in parts]).view(*x.shape[:-1], -1)
        padded = padding[rows]
        if padded == rows:
            return self.product(x, self.bias)
        single = x.shape[1] == 1
        self.buffer[:rows] = x if single else x.reshape(rows, 1, -1)
        product = self.product(self.buffer[:padded], self.bias)[:rows]
        return product if single else product.view(*x.shape[:-1], -1)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """With all rows of x (..., in features) at once."""
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, bias, "none", [], "")
        return product


def pack(model: PreTrainedModel) -> bool:
    """Replace every nn.Linear of a bfloat16 model on the CPU, in place, by a PackedLinear.

    Returns whether the layers are batch-invariant on this processor.
    """
    users = Counter(p.data_ptr() for _, p in model.named_parameters(remove_duplicate=False))
    last = model.get_output_embeddings()
    first: dict[torch.Size, PackedLinear] = {}
    buffers: dict[int, Tensor] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            weight = module.weight.detach()
            parent, _, child = name.rpartition(".")
            layer = PackedLinear(module)
            layer.buffer = buffers.setdefault(module.in_features, layer.buffer)
            of_this_shape = first.setdefault(weight.shape, layer)
            if of_this_shape is layer:
                layer.decode = RowPadding(layer, DECODE_ROWS, DECODE_ROWS[0])
                # of a prompt the last layer reads no more than the end
                layer.prefill = layer.decode if module is last else RowPadding(layer, PREFILL_ROWS, PREFILL_ROWS[-1])
            layer.decode, layer.prefill = of_this_shape.decode, of_this_shape.prefill
            setattr(model.get_submodule(parent), child, layer)
            if users[weight.data_ptr()] == 1:
                _drop_pages(weight)
    return all(layer.decode.batch_invariant and layer.prefill.batch_invariant for layer in first.values())


def agree_now(model: PreTrainedModel) -> bool:
    """Whether as many threads as there are now give a packed model's layers the bits of the number at start."""
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    return all(padding.agrees_now() for padding in {p for layer in layers for p in (layer.decode, layer.prefill)})


def _drop_pages(weight: Tensor) -> None:
    """Let the system drop the pages of a weight that nobody reads again.

    transformers maps the whole file of weights, and one small tensor still in use keeps all of it resident: 5.5 GB
    instead of 3.2 for falcon-rw-1b once it is packed.
    """
    start = -(-weight.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (weight.data_ptr() + weight.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - start
    if size > 0 and sys.platform == "linux":
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_DONTNEED)
