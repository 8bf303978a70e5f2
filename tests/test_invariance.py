"""Where the user asked for it, a GPU's bits do not depend on company: asked of Triton's interpreter, on a CPU."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from llm.devices import attention, forward, gpu, loading
from llm.devices.attention import Heads
from llm.devices.model import MAY_CHANGE, Model
from llm.engine import trial
from llm.engine.prefixes import BLOCK, Prefixes, as_bytes
from llm.engine.scheduler import Chunk
from llm.engine.sequence import Request, Sampling, Sequence
from tests.support import company, interpreter, tiny

from llm.devices import kernel_check, kernels  # isort: skip
from llm.engine import ragged  # isort: skip

pytestmark = [pytest.mark.slow, pytest.mark.interpreted]
CPU = torch.device("cpu")
GROUPED = Heads(number=2, group=2, size=32, dtype=torch.float16)
# torch's functions of a CPU compute what is no whole vector in another way
SIZE = tiny.SIZE | {"intermediate_size": 128, "num_attention_heads": 2}
NETWORKS: dict[str, Callable[[], PreTrainedModel]] = {
    "falcon": lambda: FalconForCausalLM(FalconConfig(**SIZE, **tiny.FALCON)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZE, num_key_value_heads=1)),
}


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in an order that depends on the kernel alone; fewer and smaller passes tried."""
    interpreter.sum_in_one_order(monkeypatch)
    monkeypatch.setattr(kernel_check, "DECODED", (1, 7, 32))
    monkeypatch.setattr(kernel_check, "PREFILLED", (1, 16, 80))
    monkeypatch.setattr(kernel_check, "CHUNK", 80)
    monkeypatch.setenv("TRANSFORMERS_SDPA_FORCE_GQA", "0")


def layers() -> nn.ModuleList:
    torch.manual_seed(0)
    linear = [nn.Linear(64, 48), nn.Linear(64, 48), nn.Linear(48, 64, bias=False)]
    return nn.ModuleList([*linear, nn.LayerNorm(64), LlamaRMSNorm(48), nn.Embedding(8, 64), nn.GELU()]).half()


def made_invariant(network: nn.Module, has_bias: bool = False) -> int:
    with torch.inference_mode():
        return kernel_check.make_batch_invariant(network, GROUPED, 100, has_bias, CPU)


def in_pass(block: int) -> Any:
    none = torch.zeros(0, dtype=torch.long)
    return forward.run(forward.Pass(0, 0, slice(0), ragged=kernels.RaggedTokens(none, none, block)))


@pytest.mark.parametrize("has_bias", [True, False])
def test_each_kind_of_pass_has_one_kernel_for_any_number_of_tokens(
    monkeypatch: pytest.MonkeyPatch, has_bias: bool
) -> None:
    network = layers()
    assert made_invariant(network, has_bias) == 5
    called: list[str] = []

    def noted(name: str) -> Callable[..., Tensor]:
        kernel = getattr(kernels, name)

        def call(*arguments: Any) -> Tensor:
            called.append(name)
            result: Tensor = kernel(*arguments)
            return result

        return call

    for name in ("linear", "prefill_linear"):
        monkeypatch.setattr(kernels, name, noted(name))
    for block, kernel in ((1, "linear"), (16, "prefill_linear")):
        for tokens in (1, 32):
            with in_pass(block):
                network[0](torch.zeros(1, tokens, 64).half())
            assert called.pop() == kernel and not called
    with in_pass(16):
        assert network[0](torch.zeros(1, 40, 64).half()).shape == (1, 40, 48)


def by_tokens(kernel: Callable[..., Tensor], few: int) -> Callable[..., Tensor]:
    """A product as right as the kernel's, of which more than a few tokens are summed in two halves."""

    def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ins = x.shape[-1]
        if x.numel() // ins <= few:
            return kernel(x, weight, bias)
        half = ins // 2
        result = x[..., half:].float() @ weight[:, half:].float().T + x[..., :half].float() @ weight[:, :half].float().T
        return (result if bias is None else result + bias.float()).half()

    return product


def by_place(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A norm that rounds the small numbers of the first token of a pass otherwise than those of others."""

    def norm(x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        result = kernel(x, *arguments, **options)
        first = result[:, 0]
        first.copy_(torch.where(first.abs() < 1, first * 1.001, first))
        return result

    return norm


def by_size(attend: Callable[..., Tensor], block: int, size: int) -> Callable[..., Tensor]:
    """Attention whose last bits are others in passes of one number of tokens."""

    def attended(tokens: kernels.RaggedTokens, *arguments: Any) -> Tensor:
        result = attend(tokens, *arguments)
        if (tokens.block, len(tokens.rows)) == (block, size):
            result *= 1.001
        return result

    return attended


@pytest.mark.parametrize(
    ("of", "name", "wrong"),
    [
        (kernels, "linear", lambda kernel: by_tokens(kernel, 16)),
        (kernels, "prefill_linear", lambda kernel: by_tokens(kernel, 16)),
        (kernels, "norm", by_place),
        (kernels.RaggedTokens, "attend", lambda kernel: by_size(kernel, block=1, size=1)),
        (kernels.RaggedTokens, "attend", lambda kernel: by_size(kernel, block=16, size=80)),
    ],
    ids=["decode", "prefill", "norm", "attention of a decode step", "attention of a prompt"],
)
def test_a_kernel_whose_bits_depend_on_company_is_refused(
    monkeypatch: pytest.MonkeyPatch, of: Any, name: str, wrong: Callable[[Any], Any]
) -> None:
    """Each is as right as the others: in the usual mode it is used."""
    monkeypatch.setattr(of, name, wrong(getattr(of, name)))
    network = layers()
    assert made_invariant(network) == 0
    assert not any("forward" in vars(module) for module in network)
    with torch.inference_mode():
        turns = iter(range(1000))
        assert kernel_check.layers(network, lambda step: next(turns)) == (5, 5)
        assert kernel_check.attention(GROUPED, 100, False, CPU, lambda step: next(turns))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 8, 8))


class AnotherLayerNorm(nn.Module):
    """Cohere's has a weight, OLMo's has none."""


class AnotherLinear(nn.Linear):
    pass


@pytest.mark.parametrize(
    "unknown",
    [Experts(), AnotherLayerNorm(), AnotherLinear(8, 8).half(), GPT2LMHeadModel(GPT2Config(**tiny.SIZE)).half()],
    ids=["experts", "norm", "linear", "gpt2"],
)
def test_a_network_with_a_layer_that_no_kernel_replaces_stays_as_it_is(unknown: nn.Module) -> None:
    network = nn.ModuleList([layers(), unknown])
    assert made_invariant(network) == 0
    assert not any("forward" in vars(module) for module in network.modules())


# The whole engine


@pytest.fixture
def read_invariant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, torch.dtype], Model]:
    """Makes a tiny model as Model.read has it on a GPU, whose kernels are believed."""
    monkeypatch.setattr(kernel_check.Candidate, "agrees", lambda *_: True)
    monkeypatch.setattr(kernel_check, "_keeps_bits", lambda *_: True)
    monkeypatch.setattr(kernel_check, "_attention_keeps_bits", lambda *_: True)

    def read(name: str, dtype: torch.dtype) -> Model:
        torch.manual_seed(0)
        attention.intercept("cpu")
        attention.read_grouped_as_they_are(True)
        model = Model.read(tiny.save(tmp_path, NETWORKS[name]()), dtype)
        gpu.fuse_biases(model.network)
        assert kernel_check.make_batch_invariant(model.network, model._heads, model.context, name == "falcon", CPU)
        model.stop_ids = frozenset()
        return replace(model, ragged=True, batch_invariant=True)

    return read


class Choosing(ragged.RaggedRunner):
    """Chooses with the kernel, as on a GPU."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.chooses_with_kernel = True


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("name", "dtype"), [("falcon", torch.bfloat16), ("llama", torch.float16)])
def test_tokens_and_logits_do_not_depend_on_company(
    read_invariant: Callable[[str, torch.dtype], Model], monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype
) -> None:
    """Alone and whole; then together, in smaller chunks, with what they have in common read once."""
    monkeypatch.setattr(ragged, "RaggedRunner", Choosing)
    # it has a test of its own
    monkeypatch.setattr(trial, "agreeing", lambda model, say: model)
    # on some GPUs the kernels of the two kinds of pass round otherwise; the interpreter sums both in one order
    product = kernels.prefill_linear
    monkeypatch.setattr(kernels, "prefill_linear", lambda *arguments: product(*arguments) * 1.001)
    model = read_invariant(name, dtype)
    compared = company.compare(model, count=6, most_tokens=3, context=144, lengths=(1, 2, 17, 40, 90))
    assert compared == {"tokens": 6, "logits": 6, "requests": 6}


def test_only_what_a_prefill_pass_read_is_shared(read_invariant: Callable[[str, torch.dtype], Model]) -> None:
    """The last token of a prompt, and the answer, are of decode steps, which sum in another order."""
    model = read_invariant("llama", torch.float16)
    with torch.inference_mode():
        for prompt, shared in ((2 * BLOCK, 1), (2 * BLOCK + 1, 2)):
            runner = ragged.RaggedRunner(model, 2, prefixes=Prefixes(), spare=1024)
            sequence = Sequence(Request([5] * prompt, 4, Sampling(temperature=0)), budget=4)
            runner.put(sequence)
            runner.prefill([Chunk(sequence, 0, sequence.prefill_end)])
            for _ in range(3):
                sequence.ids += as_bytes([runner.decode().read()[0]])
            runner.share(sequence)
            assert len(runner.prefixes) == shared


class Uneven(nn.Module):
    """An activation that rounds by the number of tokens, as a reduction of torch's may."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.silu(x) * (1.002 if x.shape[1] % 32 else 1)


@pytest.mark.parametrize("uneven", [False, True])
def test_a_model_whose_passes_show_other_bits_is_not_batch_invariant_and_a_line_says_so(
    read_invariant: Callable[[str, torch.dtype], Model], uneven: bool
) -> None:
    """Whatever computes them."""
    model = read_invariant("llama", torch.float16)
    if uneven:
        for layer in model.network.model.layers:
            layer.mlp.act_fn = Uneven()
    lines: list[str] = []
    tried = trial.agreeing(model, lines.append)
    assert tried.ragged and tried.batch_invariant != uneven
    assert lines.count(MAY_CHANGE) == uneven


@pytest.mark.parametrize("wrong", [False, True])
def test_one_kernel_chooses_at_every_width_if_it_chooses_so_for_each_row_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: bool
) -> None:
    read = Model.read(tiny.save(tmp_path, NETWORKS["llama"]()), torch.float16)
    choose = kernels.choose

    def by_rows(*arguments: Any, **options: Any) -> None:
        choose(*arguments, **options)
        chosen: Tensor = arguments[-1]
        chosen += len(chosen) == 1

    if wrong:
        monkeypatch.setattr(kernels, "choose", by_rows)
    with torch.inference_mode():
        runner = ragged.RaggedRunner(replace(read, ragged=True, batch_invariant=True), 8)
        assert runner.prove_choosing() != wrong
        # one that draws from all, among those that need no sort or some tokens
        samplings = [Sampling(temperature=0), Sampling(top_k=3), Sampling(top_k=0)]
        assert [runner._widths(samplings[: 1 + last]) for last in range(3)] == [[0], [128], [tiny.WORDS]]
        monkeypatch.setattr(kernels, "choose", lambda *_, **options: widths.append(options["width"]))
        widths: list[int] = []
        runner._choose(2, [tiny.WORDS])
        assert widths == ([] if wrong else [tiny.WORDS])


@pytest.mark.parametrize(("shown", "proven"), [(7, 7), (0, 5)])
def test_all_kernels_are_used_where_they_show_it_else_those_that_are_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shown: int, proven: int
) -> None:
    model = Model.read(tiny.save(tmp_path, NETWORKS["llama"]()), torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(attention, "intercept", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(kernel_check, "make_batch_invariant", lambda *_, **options: shown)
    monkeypatch.setattr(kernel_check, "layers", lambda *_, **options: (5, 7))
    monkeypatch.setattr(kernel_check, "attention", lambda *_, **options: True)
    lines: list[str] = []
    model._use_kernels(lines.append, batch_invariant=True)
    assert model.batch_invariant == bool(shown)
    assert len(lines) == 1 and f"{proven} de 7 capas y la atención" in lines[0]


@pytest.mark.parametrize("wanted", [True, False])
def test_a_gpu_without_kernels_says_that_a_text_may_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: bool
) -> None:
    """Before Ampere, in float32, or with KERNELS=0."""
    load = loading.load

    def on_gpu(*arguments: Any) -> Any:
        tokenizer, network = load(*arguments)
        network.hf_device_map = {"": torch.device("cuda", 0)}  # type: ignore[assignment]
        return tokenizer, network

    monkeypatch.setattr(loading, "load", on_gpu)
    monkeypatch.setattr(gpu, "has_kernels", lambda *_: False)
    lines: list[str] = []
    folder = tiny.save(tmp_path, NETWORKS["llama"]())
    model = Model.read(folder, torch.float32, say=lines.append, batch_invariant=wanted)
    assert not model.batch_invariant
    assert lines.count(MAY_CHANGE) == wanted
