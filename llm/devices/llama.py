"""Decoder layers like Llama's, in a decode pass on a CPU: one kernel, or a third of transformers' operations.

A layer of a small model is some 90 operations, and for a few rows they take a CPU longer than the layer's products.
Prefill passes have enough tokens for each operation, and stay transformers'.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from llm.devices import attention, forward
from llm.devices.activation import BatchInvariantActivation
from llm.devices.linear import Float32Linear, JoinedLinear, PackedLinear

Function = Callable[[Tensor], Tensor]

LIKE_LLAMA = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}
"""Classes of transformers. Whether they compute what is written here, the trial shows."""


def replace(network: nn.Module) -> None:
    """Have the packed layers of a network that are like Llama's compute decode passes in fewer operations, in place."""
    for module in network.modules():
        if type(module).__name__ in LIKE_LLAMA:
            layer: Any = module
            if isinstance(layer.self_attn.q_proj, JoinedLinear) and isinstance(layer.mlp.gate_proj, JoinedLinear):
                layer.forward = LlamaLayer(layer)


def is_replaced(network: nn.Module) -> bool:
    return any(_replaced(network))


def restore(network: nn.Module) -> None:
    """Undo `replace`."""
    for module in _replaced(network):
        del module.forward


def _replaced(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if isinstance(module.forward, LlamaLayer)]


class LlamaLayer:
    """The forward of a decoder layer."""

    def __init__(self, layer: Any):
        self_attn, mlp = layer.self_attn, layer.mlp
        self.transformers: Callable[..., Tensor] = layer.forward
        self.index = self_attn.layer_idx
        self.head_size = self_attn.head_dim
        self.scale = self_attn.scaling
        self.query_heads = self_attn.q_proj.outputs // self_attn.head_dim
        self.key_heads = self_attn.k_proj.outputs // self_attn.head_dim
        self.before_attention = _Norm(layer.input_layernorm)
        self.before_mlp = _Norm(layer.post_attention_layernorm)
        self.head_norms = [_Norm(self_attn.q_norm), _Norm(self_attn.k_norm)] if hasattr(self_attn, "q_norm") else []
        self.queries_keys_values: Function = self_attn.q_proj.whole
        self.output: Function = self_attn.o_proj
        self.gate_and_up: Function = mlp.gate_proj.whole
        self.activation: Function = mlp.act_fn
        self.down: Function = mlp.down_proj
        self.kernel = self._kernel(self_attn.q_proj.whole, self_attn.o_proj, mlp.gate_proj.whole, mlp.down_proj)

    def __call__(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """hidden_states (rows, tokens, width). Returns the same shape."""
        pass_ = forward.current()
        if pass_ is None or pass_.tokens:
            return self.transformers(hidden_states, **kwargs)
        return self._decoded(hidden_states, pass_, **kwargs)

    def _decoded(
        self,
        x: Tensor,
        pass_: forward.Pass,
        attention_mask: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: Any,
        **kwargs: object,
    ) -> Tensor:
        rows = len(x) - pass_.padding
        rotation_and_mask = _for_all_layers(pass_, rows, x.dtype, attention_mask, *position_embeddings)
        cache = past_key_values.layers[self.index]
        result: Tensor
        if self.kernel and cache.is_initialized:
            result = self.kernel.step(x, *rotation_and_mask, cache.keys, cache.values, pass_.positions, pass_.length)
            return result
        heads = self.queries_keys_values(self.before_attention(x)).view(len(x), -1, self.head_size)
        attended = self._attend(heads[:rows], *rotation_and_mask, past_key_values)
        x = self.output(pass_.with_padding(attended)).add_(x)
        gate, up = self.gate_and_up(self.before_mlp(x)).chunk(2, -1)
        return self.down(self.activation(gate).mul_(up)).add_(x)

    def _kernel(self, *products: PackedLinear) -> Any:
        """What computes the layer in one kernel; None where there is none for it."""
        is_silu = isinstance(self.activation, BatchInvariantActivation) and isinstance(
            self.activation.function, SiLUActivation
        )
        if not is_silu or not all(isinstance(product, Float32Linear) for product in products):
            return None
        from llm.devices import decode_layer  # imports llvmlite, which is there for Linux on x86 alone

        norms = self.before_attention, self.before_mlp, *self.head_norms
        weights: list[Any] = [product.packed for product in products]
        shape = decode_layer.Shape(
            width=weights[0].in_features,
            query_heads=self.query_heads,
            key_heads=self.key_heads,
            head_size=self.head_size,
            inner=weights[3].in_features,
            scale=self.scale,
            least=tuple(norm.least for norm in norms),
            stored=tuple(weight.dtype for weight in weights),
        )
        return decode_layer.DecodeLayer(shape, [norm.weight for norm in norms], weights) if shape.fits() else None

    def _attend(self, heads: Tensor, cosine: Tensor, sine: Tensor, mask: Tensor, past_key_values: Any) -> Tensor:
        """heads (rows, query heads and those of keys and of values, head size). Returns (rows, 1, width of all)."""
        turned, values = heads.split([self.query_heads + self.key_heads, self.key_heads], 1)
        if self.head_norms:
            parts = turned.split([self.query_heads, self.key_heads], 1)
            turned = torch.cat([norm(part) for norm, part in zip(self.head_norms, parts, strict=True)], 1)
        turned = (turned * cosine).add_(turned.roll(self.head_size // 2, -1).mul_(sine))
        queries, keys = turned[:, :, None].split([self.query_heads, self.key_heads], 1)
        keys, values = past_key_values.update(keys, values[:, :, None], self.index)
        return attention.attend(queries, keys, values, mask, scale=self.scale).view(len(heads), 1, -1)


class _Norm:
    """An RMSNorm, rounded once."""

    def __init__(self, norm: Any):
        width = len(norm.weight)
        self.weight = norm.weight.detach().float() * width**0.5
        self.least = width * norm.variance_epsilon

    def __call__(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        normed: Tensor = (x / length.mul_(length).add_(self.least).sqrt_()).mul_(self.weight)
        return normed.to(x.dtype)


def _for_all_layers(
    pass_: forward.Pass, rows: int, dtype: torch.dtype, mask: Tensor, cosine: Tensor, sine: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """For a pass' rows without padding: the cosine; the sine, negative where Llama's rotation turns a sign; the mask,
    additive."""
    key = "llama", mask.data_ptr(), cosine.data_ptr()
    if key not in pass_.memo:
        first, second = sine[:rows].chunk(2, -1)
        additive = attention.additive(mask, dtype, pass_)[:rows]
        # the other tensors are remembered too, so that their places in memory stay their own
        pass_.memo[key] = (cosine[:rows], torch.cat([-first, second], -1), additive), mask, cosine
    shared: tuple[Tensor, Tensor, Tensor] = pass_.memo[key][0]
    return shared
