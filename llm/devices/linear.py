"""Linear layers for the CPU: weights laid out as the processor reads them fastest, and batch-invariant products.

How a product is summed, and so its last bits, may depend on how many rows are computed together. In bfloat16 layers
pad their input to numbers of rows that agree (padding.py); in float32 the kernels of products.py compute all alike.
"""

import ctypes
import mmap
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llm.devices import forward, memory, processor
from llm.devices.padding import RowPadding

JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers of one module that read the same inputs in nearly all architectures: one product computes all of them."""
PACKED_AT_ONCE = 8
"""Layers that threads pack side by side, at most: each needs memory for its weight."""


class PackedLinear(nn.Module, ABC):
    """An nn.Linear whose weight is in another layout, several times as fast to read for a few rows.

    The layer skips the padding of a prefill pass: prompts of different lengths cost no more than their tokens.
    """

    dtype: ClassVar[torch.dtype]
    """Of inputs, biases and products."""
    read_as: ClassVar[torch.dtype | None]
    """What a checkpoint is loaded in, to be packed; None: in its own dtype."""

    stored: torch.dtype
    """Of its weight."""
    out_features: int

    @abstractmethod
    def __init__(self, weight: Tensor, bias: Tensor | None):
        """weight (out features, in features); bias (out features,)."""
        super().__init__()

    @staticmethod
    @abstractmethod
    def is_fast() -> bool:
        """Whether this processor has the instructions."""

    @staticmethod
    def compile_ahead(stored: torch.dtype) -> None:
        """Compile what products with weights of a dtype need, while the weights are read."""

    @staticmethod
    @abstractmethod
    def prepare(layers: list["PackedLinear"], last: nn.Module | None) -> bool:
        """Once all layers of a network are packed, make them ready for their passes. last: the layer that computes the
        logits. Returns whether all are batch-invariant on this processor."""

    @abstractmethod
    def product(self, x: Tensor, rows: int, decodes: bool) -> Tensor:
        """x (..., in features), of so many rows; decodes: as a decode pass computes, for which a layer may have other
        numbers of rows. Returns (..., out features)."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in features) of `dtype`. Returns (..., out features), 0 for padding."""
        tokens = x.numel() // x.shape[-1]
        pass_ = forward.current()
        # the last layer reads one token of each prompt
        if pass_ is None or tokens != pass_.tokens:
            return self.product(x, tokens, decodes=True)
        indices = pass_.prompt_tokens
        if indices is None:
            return self.product(x, tokens, decodes=False)
        result = x.new_zeros(tokens, self.out_features)
        result[indices] = self.product(x.flatten(0, -2)[indices], len(indices), decodes=False)
        return result.view(*x.shape[:-1], -1)


class JoinedLinear(nn.Module):
    """One of several linear layers whose weights are one PackedLinear: the first that a pass calls computes them all.

    A layer that is called with other inputs than the one before, or outside a pass, computes the whole product too.
    """

    def __init__(self, whole: PackedLinear, start: int, outputs: int):
        """So many outputs of the whole, from `start` on."""
        super().__init__()
        self.whole = whole
        self.start = start
        self.outputs = outputs

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in features) of the whole's dtype. Returns (..., outputs)."""
        pass_ = forward.current()
        if pass_ is None:
            return self._part(self.whole(x))
        whole, inputs, product = pass_.product or (None, None, x)
        if whole is not self.whole or inputs is not x:
            product = self.whole(x)
            pass_.product = self.whole, x, product
        # what sums the values of few rows may do so in an order that depends on where the rows lie
        return self._part(product) if pass_.tokens else self._part(product).contiguous()

    def _part(self, product: Tensor) -> Tensor:
        return product.narrow(-1, self.start, self.outputs)


class BFloat16Linear(PackedLinear):
    """Weights, inputs and products in bfloat16: oneDNN's blocked layout.

    How a product is summed depends on how many rows are computed together: a layer pads its input to numbers of rows
    for which the processor, asked at start, gives every row the same bits.
    """

    dtype = read_as = stored = torch.bfloat16
    # oneDNN reads the weights a fifth faster for four rows than for one (Zen 4)
    decode_rows = (4, 8, 16, 32)
    prefill_rows = (*decode_rows, 64, 128, 256)
    """What the rows of a decode pass and the tokens of a prefill pass are padded to, where they have to be."""

    decode: RowPadding
    """In a decode pass, and in the last layer of a prefill pass, which reads one token of each prompt."""
    prefill: RowPadding
    """In every other layer of a prefill pass."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__(weight, bias)
        self.out_features = len(weight)
        self.bias = None if bias is None else bias.detach().to(self.dtype)
        self.buffer = torch.zeros(self.prefill_rows[-1], weight.shape[1], dtype=self.dtype)
        """Where rows are padded. The padding's values do not matter."""
        self.packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())

    @staticmethod
    def is_fast() -> bool:
        return processor.computes_bfloat16()

    @staticmethod
    def prepare(layers: list[Any], last: nn.Module | None) -> bool:
        first: dict[tuple[int, int], BFloat16Linear] = {}
        buffers: dict[int, Tensor] = {}
        for layer in layers:
            in_features = layer.buffer.shape[-1]
            layer.buffer = buffers.setdefault(in_features, layer.buffer)
            of_this_shape = first.setdefault((layer.out_features, in_features), layer)
            if of_this_shape is layer:
                layer.decode = RowPadding(layer, layer.decode_rows, layer.decode_rows)
                # of a prompt the last layer reads no more than the end
                if layer is last:
                    layer.prefill = layer.decode
                else:
                    layer.prefill = RowPadding(layer, layer.prefill_rows, reversed(layer.prefill_rows))
            layer.decode, layer.prefill = of_this_shape.decode, of_this_shape.prefill
        return all(layer.decode.batch_invariant and layer.prefill.batch_invariant for layer in first.values())

    def product(self, x: Tensor, rows: int, decodes: bool) -> Tensor:
        return self._padded(x, rows, self.decode if decodes else self.prefill)

    def _padded(self, x: Tensor, rows: int, padding: RowPadding) -> Tensor:
        if rows > padding.most:
            parts = x.reshape(rows, -1).split(padding.most)
            return torch.cat([self._padded(part, len(part), padding) for part in parts]).view(*x.shape[:-1], -1)
        padded = padding[rows]
        if padded == rows:
            return self.of_all(x.contiguous(), self.bias)
        self.buffer[:rows] = x.reshape(rows, -1)
        return self.of_all(self.buffer[:padded], self.bias)[:rows].view(*x.shape[:-1], -1)

    def of_all(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Of all rows of x (..., in features) at once, contiguous."""
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, bias, "none", [], "")
        return product


class Float32Linear(PackedLinear):
    """Inputs and products in float32, weights as narrow as they can be: for x86 processors without bfloat16.

    The kernels of products.py are batch-invariant for any number of rows.
    """

    dtype = torch.float32
    read_as = None

    def __init__(self, weight: Tensor, bias: Tensor | None):
        from llm.devices import products  # imports llvmlite, which is there for Linux on x86 alone

        super().__init__(weight, bias)
        self.packed = products.PackedWeight(weight, bias)
        self.out_features = self.packed.out_features
        self.stored = self.packed.dtype

    @staticmethod
    def is_fast() -> bool:
        return processor.runs_kernels()

    @staticmethod
    def compile_ahead(stored: torch.dtype) -> None:
        from llm.devices import products  # imports llvmlite, which is there for Linux on x86 alone

        products.compile_ahead(stored)

    @staticmethod
    def prepare(layers: list[Any], last: nn.Module | None) -> bool:
        return True

    def product(self, x: Tensor, rows: int, decodes: bool) -> Tensor:
        return self.packed.product(x)


def layout(chosen: torch.dtype | None) -> type[PackedLinear] | None:
    """The layout for a model on this machine's CPU; None where there is none for the dtype that the user chose, or a
    GPU computes."""
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        return None
    if BFloat16Linear.is_fast():
        return BFloat16Linear if chosen in (None, torch.bfloat16) else None
    return Float32Linear if chosen is None and Float32Linear.is_fast() else None


def pack(network: PreTrainedModel, layout: type[PackedLinear]) -> bool:
    """Replace every linear layer of a network on the CPU, in place. All else then computes in `layout.dtype`.

    Each weight is dropped as soon as it is packed: packing needs memory for the weights and PACKED_AT_ONCE more layers.
    Returns whether the network's products are batch-invariant on this processor.
    """
    users = Counter(p.data_ptr() for _, p in network.named_parameters(remove_duplicate=False))
    threads = torch.get_num_threads()

    def replace(parent: nn.Module, names: list[str]) -> PackedLinear:
        linears: list[Any] = [getattr(parent, name) for name in names]
        weights: list[Any] = [_weight(linear) for linear in linears]
        biases = [linear.bias for linear in linears if linear.bias is not None]
        whole = layout(_joined(weights), _joined(biases) if biases else None)
        start = 0
        for name, linear, weight in zip(names, linears, weights, strict=True):
            outputs = len(weight)
            setattr(parent, name, whole if len(names) == 1 else JoinedLinear(whole, start, outputs))
            start += outputs
            del linear.weight
            if users[weight.data_ptr()] == 1:
                _drop_pages(weight)
        memory.trim()
        return whole

    def values(group: tuple[nn.Module, list[str]]) -> int:
        return sum(getattr(group[0], name).weight.numel() for name in group[1])

    # the largest first, so that no thread is left alone with it at the end, beside all that is packed by then
    groups = sorted(_groups(network), key=values, reverse=True)
    # packing computes on one thread
    pool = ThreadPoolExecutor(min(threads, PACKED_AT_ONCE), initializer=torch.set_num_threads, initargs=(1,))
    try:
        with pool:
            layers = list(pool.map(lambda group: replace(*group), groups))
    finally:
        torch.set_num_threads(threads)
    _convert_all_else(network, layout.dtype)
    if next(network.parameters(), None) is None:
        # OLMo's norms have no weights: then nothing is left of which transformers reads the network's dtype
        network.register_parameter("of_its_dtype", nn.Parameter(torch.empty(0, dtype=layout.dtype)))

    agree = layout.prepare(layers, network.get_output_embeddings())
    memory.trim()
    return agree and not any(_has_products(module) for module in network.modules())


def precision(network: PreTrainedModel) -> str:
    """Of a packed network's weights and products, in Spanish, for the log."""
    layers = [*_packed(network)]
    stored = " y ".join(sorted({_name(layer.stored) for layer in layers}))
    computed = _name(layers[0].dtype)
    return stored if stored == computed else f"{stored}, con las cuentas en {computed}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def agree_now(network: PreTrainedModel) -> bool:
    """Whether as many threads as there are now give a packed network's layers the bits of the number at start."""
    paddings = decode_paddings(network) | {layer.prefill for layer in _padded(network)}
    return all(padding.agrees_now() for padding in paddings)


def decode_paddings(network: PreTrainedModel) -> set[RowPadding]:
    """Those of a packed network's layers."""
    return {layer.decode for layer in _padded(network)}


def _packed(network: PreTrainedModel) -> Iterator[PackedLinear]:
    return (module for module in network.modules() if isinstance(module, PackedLinear))


def _padded(network: PreTrainedModel) -> Iterator[BFloat16Linear]:
    return (layer for layer in _packed(network) if isinstance(layer, BFloat16Linear))


def _groups(network: nn.Module) -> Iterator[tuple[nn.Module, list[str]]]:
    """All linear layers, as names of a module's children: those of JOINED together where their weights are alike."""
    for module in network.modules():
        linears: dict[str, Any] = {name: child for name, child in module.named_children() if _weight(child) is not None}
        for names in JOINED:
            layers = [linears[name] for name in names if name in linears]
            kinds = {(type(layer), layer.bias is None, layer.weight.dtype, layer.weight.shape[1]) for layer in layers}
            if len(layers) == len(names) and len(kinds) == 1:
                yield module, [*names]
                linears = {name: layer for name, layer in linears.items() if name not in names}
        yield from ((module, [name]) for name in linears)


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _weight(module: nn.Module) -> Tensor | None:
    """Of a linear layer, (out features, in features)."""
    if isinstance(module, nn.Linear):
        return module.weight.detach()
    return module.weight.detach().t() if isinstance(module, Conv1D) else None


def _has_products(module: nn.Module) -> bool:
    """Whether a module that is not packed multiplies by a matrix, as a mixture of experts does."""
    return not isinstance(module, nn.Embedding) and any(p.dim() > 1 for p in module.parameters(recurse=False))


def _convert_all_else(network: PreTrainedModel, dtype: torch.dtype) -> None:
    embeddings = network.get_input_embeddings()
    for module in network.modules():
        if type(module) is nn.Embedding and module is embeddings and module.weight.dtype != dtype:
            # The weight keeps its size. As a buffer it does not pass for the network's dtype.
            weight = module.weight.detach()
            del module.weight
            module.register_buffer("weight", weight, persistent=False)
            module.register_forward_hook(lambda _, inputs, output: output.to(dtype))
            continue
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)


def _drop_pages(weight: Tensor) -> None:
    """Let the system drop the pages of a weight that nobody reads again.

    transformers maps the whole file of weights, and one small tensor still in use keeps all of it resident: 5.5 GB
    instead of 3.2 for falcon-rw-1b once it is packed.
    """
    start = -(-weight.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (weight.data_ptr() + weight.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - start
    if size > 0 and sys.platform == "linux":
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_DONTNEED)
