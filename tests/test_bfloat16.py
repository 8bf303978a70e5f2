"""In bfloat16 the packed model computes what transformers computes, within the rounding of bfloat16."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from llm.devices import forward, linear
from llm.devices.attention import attend
from llm.devices.model import Model
from llm.devices.padding import RowPadding
from tests.support import checkpoints, logits

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("length", "rows", "packed"), logits.CASES)
def test_logits_are_as_near_to_float32_as_those_of_transformers(
    bfloat16_folder: Path, length: int, rows: int, packed: bool
) -> None:
    if packed and not linear.BFloat16Linear.is_fast():
        pytest.skip("this processor does not compute in bfloat16")
    assert logits.distance(bfloat16_folder, length, rows, packed) < logits.MOST


@pytest.mark.skipif(not linear.BFloat16Linear.is_fast(), reason="this processor does not compute in bfloat16")
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (4, 1), (2, 3), (5,)])
def test_a_packed_layer_takes_any_shape(shape: tuple[int, ...]) -> None:
    plain = torch.nn.Linear(64, 32, dtype=torch.bfloat16)
    # OPT's layers see rows and tokens as one
    pass_ = forward.Pass(length=5, start=0, rows=slice(1), tokens=5, prompt_tokens=torch.tensor([0, 3]))
    x = torch.randn(*shape, 64).bfloat16()
    with torch.inference_mode():
        expected = plain(x)
        packed = linear.BFloat16Linear(plain.weight, plain.bias)
        packed.decode = packed.prefill = RowPadding(packed, packed.decode_rows, packed.decode_rows)
        with forward.run(pass_):
            result = packed(x)
        if len(shape) == 1:
            expected[[1, 2, 4]] = 0
    torch.testing.assert_close(result, expected)


@pytest.mark.skipif(not linear.BFloat16Linear.is_fast(), reason="this processor does not compute in bfloat16")
def test_attention_is_ours_in_our_passes_and_torchs_in_all_others(bfloat16_folder: Path) -> None:
    query, key, value = (torch.randn(1, 4, tokens, 64).bfloat16() for tokens in (1, 64, 64))

    def attention() -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, value)

    theirs, ours = attention(), attend(query, key, value)
    assert not torch.equal(theirs, ours)

    model = Model.read(bfloat16_folder, torch.bfloat16, layout=linear.BFloat16Linear)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    pass_ = forward.Pass(length=2, start=0, rows=slice(1), tile=model.tile)
    with ThreadPoolExecutor(1) as thread:
        layer = model.network.get_input_embeddings()
        layer.register_forward_hook(lambda *_: seen.append((attention(), thread.submit(attention).result())))
        with torch.inference_mode():
            with forward.run(pass_):
                model.network(torch.tensor([[1, 2]]))
            with (
                pytest.raises(IndexError),
                forward.run(pass_),
            ):
                model.network(torch.tensor([[checkpoints.VOCABULARY]]))
    ((within, beside),) = seen
    assert torch.equal(within, ours)
    assert torch.equal(beside, theirs)
    assert torch.equal(attention(), theirs)
