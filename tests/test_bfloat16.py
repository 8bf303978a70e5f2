"""In bfloat16 the packed model computes what transformers computes, within the rounding of bfloat16.

The yardstick is that rounding itself: how far transformers' own bfloat16 logits are from its float32 ones.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from llm import processor
from llm.model import Model
from llm.runner import Runner
from llm.sampling import Sampling
from tests import checkpoints

STEPS = 40
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # heads of 64, as falcon-rw-1b's: their square root divides ALiBi without rounding, in every attention
    return checkpoints.falcon(tmp_path_factory.mktemp("bfloat16") / "falcon", layers=3, width=256, heads=4)


def reference(folder: Path, text: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """transformers' logits after each of the last STEPS + 1 ids of the text: (STEPS + 1, vocabulary) float32."""
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.inference_mode():
        logits: torch.Tensor = network(text[None]).logits[0, -STEPS - 1 :, : checkpoints.TOKENS].float()
    return logits


def walked(model: Model, text: torch.Tensor, rows: int) -> torch.Tensor:
    """Our logits at the same places, decoding along the text in so many rows: (rows, STEPS + 1, vocabulary) float32.

    Row r has a prompt r tokens shorter, and stays r steps behind. What it has not reached is left out as NaN.
    """
    runner = Runner(model, rows)
    prompt = len(text) - STEPS
    found = torch.full((rows, STEPS + 1, model.vocabulary), torch.nan)
    with torch.inference_mode():
        for row in range(rows):
            runner.put(row, text[: prompt - row].tolist(), GREEDY)
        runner.prefill({row: prompt - row for row in range(rows)})
        for step in range(STEPS):
            for row in range(rows):
                at = prompt - row + step
                runner.history[row, at] = text[at]
            runner.decode()
            for row in range(min(rows, step + 2)):
                found[row, step + 1 - row] = runner.logits[row]
    return found


@pytest.mark.parametrize("length", [150, 1200])
@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("packed", [False, True])
def test_logits_are_as_near_to_float32_as_those_of_transformers(
    folder: Path, length: int, rows: int, packed: bool
) -> None:
    text = torch.randint(0, checkpoints.TOKENS, (length,), generator=torch.Generator().manual_seed(1))
    exact = reference(folder, text, torch.float32)
    rounding = (reference(folder, text, torch.bfloat16) - exact).square().mean().sqrt()
    model = Model.read(folder, torch.bfloat16)
    if packed:
        if not processor.computes_in_bfloat16():
            pytest.skip("this processor does not compute in bfloat16")
        model.pack()
    for found in walked(model, text, rows):
        reached = ~found[:, 0].isnan()
        assert reached.sum() >= STEPS - rows
        # not 1: a step rounds elsewhere than one pass over the whole text, and its scores too. A wrong ALiBi: 5
        assert (found[reached] - exact[reached]).square().mean().sqrt() < 2 * rounding


@pytest.mark.skipif(not processor.computes_in_bfloat16(), reason="this processor does not compute in bfloat16")
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (4, 1), (2, 3), (5,)])
def test_a_packed_layer_takes_any_shape(shape: tuple[int, ...]) -> None:
    linear = torch.nn.Linear(64, 32, dtype=torch.bfloat16)
    padding = processor.Padding()
    if len(shape) == 1:
        # OPT's layers see rows and tokens as one
        padding.real = torch.tensor([0, 3])
    x = torch.randn(*shape, 64).bfloat16()
    with torch.inference_mode():
        expected = linear(x)
        found = processor.PackedLinear(linear, padding)(x)
    torch.testing.assert_close(found, expected)


@pytest.mark.skipif(not processor.computes_in_bfloat16(), reason="this processor does not compute in bfloat16")
def test_attention_is_ours_in_our_passes_and_torchs_in_all_others(folder: Path) -> None:
    # of one query: of several, ours is torch's
    query, key, value = (torch.randn(1, 4, tokens, 64).bfloat16() for tokens in (1, 64, 64))

    def attention() -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, value)

    theirs, ours = attention(), processor.attend(query, key, value)
    assert not torch.equal(theirs, ours)

    model = Model.read(folder, torch.bfloat16)
    model.pack()
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    with ThreadPoolExecutor(1) as thread:
        layer = model.network.get_input_embeddings()
        layer.register_forward_hook(lambda *_: seen.append((attention(), thread.submit(attention).result())))
        with torch.inference_mode():
            model.network(torch.tensor([[1, 2]]))
            with pytest.raises(IndexError):
                model.network(torch.tensor([[checkpoints.VOCABULARY]]))
    ((within, beside),) = seen
    assert torch.equal(within, ours)
    assert torch.equal(beside, theirs)
    assert torch.equal(attention(), theirs)
