"""What a GPU is asked at start, asked of Triton's interpreter on a CPU: a wrong kernel and a slow one are not used."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, FalconConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from llm.devices import attention, gpu
from llm.devices.attention import Heads
from llm.devices.model import Model
from llm.errors import UserError
from tests.support import interpreter, tiny  # noqa: F401

from llm.devices import kernel_check, kernels  # isort: skip

pytestmark = [pytest.mark.slow, pytest.mark.interpreted]
CPU = torch.device("cpu")
FALCON = Heads(number=4, group=1, size=64, dtype=torch.bfloat16)
GROUPED = Heads(number=6, group=3, size=32, dtype=torch.float16)


def first_is_faster() -> Callable[[Callable[[], Tensor]], float]:
    """Takes the steps that it measures for slower and slower."""
    measured: list[object] = []

    def seconds(step: Callable[[], Tensor]) -> float:
        measured.append(step)
        return len(measured)

    return seconds


@pytest.mark.parametrize(("heads", "has_bias"), [(FALCON, True), (GROUPED, False)], ids=["falcon", "grouped"])
def test_attention_that_agrees_and_is_faster_is_used(heads: Heads, has_bias: bool) -> None:
    assert kernel_check.attention(heads, 300, has_bias, CPU, first_is_faster())


def test_attention_that_is_no_faster_is_not_used() -> None:
    assert not kernel_check.attention(GROUPED, 100, False, CPU, lambda step: 1.0)


def sees_the_next_key(tokens: kernels.RaggedTokens) -> None:
    tokens.positions = torch.where(tokens.positions < 0, -1, tokens.positions + 1).clamp(max=99)


def forgets_a_key(tokens: kernels.RaggedTokens) -> None:
    tokens.positions = tokens.positions - 1


@pytest.mark.parametrize("of_block", [1, kernels.FEWEST_QUERIES], ids=["decode", "prefill"])
@pytest.mark.parametrize("fault", [sees_the_next_key, forgets_a_key])
def test_attention_that_is_wrong_is_not_used(
    monkeypatch: pytest.MonkeyPatch, of_block: int, fault: Callable[[kernels.RaggedTokens], None]
) -> None:
    attend = kernels.RaggedTokens.attend

    def wrong(tokens: kernels.RaggedTokens, *arguments: object) -> Tensor:
        shifted = kernels.RaggedTokens(tokens.rows, tokens.positions, tokens.block)
        if tokens.block == of_block:
            fault(shifted)
        return attend(shifted, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(kernels.RaggedTokens, "attend", wrong)
    assert not kernel_check.attention(GROUPED, 100, False, CPU, first_is_faster())


def test_a_key_written_elsewhere_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    write = kernels.RaggedTokens.write

    def elsewhere(tokens: kernels.RaggedTokens, *arguments: object) -> None:
        shifted = kernels.RaggedTokens(tokens.rows, (tokens.positions - 1).clamp(min=0), tokens.block)
        write(shifted, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(kernels.RaggedTokens, "write", elsewhere)
    assert not kernel_check.attention(GROUPED, 100, False, CPU, first_is_faster())


class Scaled(nn.Module):
    """An RMSNorm that multiplies by one more than its weight, as Gemma's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(64)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        numbers = x.float()
        normalized = numbers * torch.rsqrt(numbers.pow(2).mean(-1, keepdim=True) + self.eps)
        return (normalized * (1 + self.weight.float())).type_as(x)


class ScaledRMSNorm(Scaled):
    pass


def network() -> nn.ModuleList:
    """In float16: the interpreter cuts bfloat16 off instead of rounding."""
    torch.manual_seed(0)
    layers = [nn.Linear(64, 96), nn.Linear(64, 96), nn.Linear(96, 64, bias=False), nn.LayerNorm(64), LlamaRMSNorm(96)]
    return nn.ModuleList([*layers, ScaledRMSNorm(), nn.Embedding(8, 64), nn.GELU()]).half()


@torch.inference_mode()
def test_layers_whose_kernels_agree_and_are_faster_use_them() -> None:
    layers, originals = network(), network()
    assert kernel_check.layers(layers, first_is_faster()) == (5, 6), "all but the norm that computes something else"
    for tokens in (1, 3, 40):
        for layer, original in zip([*layers][:6], [*originals][:6], strict=True):
            width = original.weight.shape[-1]
            x = torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(tokens)).half()
            torch.testing.assert_close(layer(x), original(x), rtol=2e-3, atol=2e-3)


@torch.inference_mode()
def test_layers_whose_kernels_are_no_faster_stay() -> None:
    layers = network()
    assert kernel_check.layers(layers, lambda step: 1.0) == (0, 6)
    assert not any("forward" in vars(layer) for layer in layers)


@torch.inference_mode()
@pytest.mark.parametrize(("kernel", "proven"), [("linear", 2), ("norm", 3)])
def test_layers_whose_kernels_are_wrong_stay(monkeypatch: pytest.MonkeyPatch, kernel: str, proven: int) -> None:
    right = getattr(kernels, kernel)

    def wrong(*arguments: Any, **options: Any) -> Tensor:
        result: Tensor = right(*arguments, **options)
        result[..., -1] += 0.1
        return result

    monkeypatch.setattr(kernels, kernel, wrong)
    assert kernel_check.layers(network(), first_is_faster()) == (proven, 6)


def without_compiler(*arguments: Any, **options: Any) -> None:
    raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nMore.")


@pytest.mark.parametrize(
    ("replaced", "ragged", "line"),
    [
        ({"layers": without_compiler}, False, "no se pudieron probar (Failed to find C compiler."),
        (
            {"layers": lambda network, say: (0, 6), "attention": lambda *_, say: False},
            False,
            "Sin kernels propios: en esta GPU",
        ),
        (
            {"layers": lambda network, say: (5, 6), "attention": lambda *_, say: False},
            False,
            "propios: 5 de 6 capas, probados",
        ),
        (
            {"layers": lambda network, say: (5, 6), "attention": lambda *_, say: True},
            True,
            "5 de 6 capas y la atención",
        ),
    ],
    ids=["no compiler", "none", "layers", "all"],
)
def test_one_line_says_which_kernels_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaced: dict[str, Any], ragged: bool, line: str
) -> None:
    model = Model.read(tiny.save(tmp_path, LlamaForCausalLM(LlamaConfig(**tiny.SIZE))), torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(attention, "intercept", lambda device: None)
    monkeypatch.setenv("TRANSFORMERS_SDPA_FORCE_GQA", "0")
    for name, function in replaced.items():
        monkeypatch.setattr(kernel_check, name, function)
    lines: list[str] = []
    model._use_kernels(lines.append)
    assert len(lines) == 1 and line in lines[0]
    assert model.ragged == ragged


def test_a_kernel_that_breaks_the_gpu_ends_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything fails there from then on: it would look as if the weights did not fit."""

    def lost(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nMore.")

    model = Model.read(tiny.save(tmp_path, LlamaForCausalLM(LlamaConfig(**tiny.SIZE))), torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    monkeypatch.setattr(kernel_check, "layers", lost)
    with pytest.raises(UserError, match=r"illegal memory access was encountered\): ponga KERNELS=0"):
        model._use_kernels(lambda line: None)


@torch.inference_mode()
def test_a_kernel_that_fails_leaves_the_others_and_the_log_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any, **options: Any) -> Tensor:
        raise RuntimeError("ptxas failed with error code 255\nMore.")

    lines: list[str] = []
    monkeypatch.setattr(kernels, "linear", broken)
    assert kernel_check.layers(network(), first_is_faster(), lines.append) == (2, 6)
    assert "Sin kernel para Linear de 96 x 64, tokens: 1: no se pudo probar (ptxas failed with error code 255)" in lines
    assert any("ScaledRMSNorm de 64" in line and "su error es" in line for line in lines)


@pytest.mark.parametrize("name", ["falcon", "llama"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of weights that nobody wrote
def test_what_compiles_while_weights_are_read_is_what_is_tried_then(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a network without weights, in the same dtype."""
    config: Any = {
        "falcon": FalconConfig(**tiny.SIZE, **tiny.FALCON),
        "llama": LlamaConfig(**tiny.SIZE, num_key_value_heads=2),
    }[name]
    has_bias, heads = name == "falcon", Heads(number=4, group=2, size=16, dtype=torch.bfloat16)
    compiled: list[kernel_check.Candidate] = []

    def noted(candidates: list[kernel_check.Candidate], device: torch.device) -> list[Exception | None]:
        compiled.extend(candidates)
        return []

    monkeypatch.setattr(kernel_check, "compile_at_once", noted)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    kernel_check.compile_ahead(empty, heads, 100, has_bias, CPU)
    ahead, compiled[:] = [*compiled], []
    network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    gpu.fuse_biases(network)
    with torch.inference_mode():
        kernel_check.layers(network, lambda step: 1.0)
        kernel_check.attention(heads, 100, has_bias, CPU, lambda step: 1.0)
    assert [candidate.name for candidate in ahead] == [candidate.name for candidate in compiled]
    assert [candidate.kernel().shape for candidate in ahead] == [candidate.kernel().shape for candidate in compiled]


def test_what_fails_while_kernels_compile_side_by_side_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread may meet a kernel that another one has compiled and not yet loaded."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    calls: list[None] = []

    def kernel() -> Tensor:
        calls.append(None)
        if len(calls) == 1:
            raise TypeError("'NoneType' object cannot be interpreted as an integer")
        return torch.ones(1)

    candidate = kernel_check.Candidate("una suma", kernel, lambda: torch.ones(1), lambda: torch.ones(1))
    (failure,) = kernel_check.compile_at_once([candidate], torch.device("cuda"))
    assert isinstance(failure, TypeError)
    assert kernel_check.proven([candidate], first_is_faster())
