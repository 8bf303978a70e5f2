"""What only a GPU can show: `script/test -m gpu` runs this file alone, and prints what each kernel does beside torch.
Not yet run on one."""

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from llm.devices.attention import Heads
from llm.devices.gpu import avoid_cudnn_attention, fuse_biases, is_ampere
from llm.devices.model import Model
from llm.engine.engine import Engine
from llm.engine.sequence import Request, Sampling
from llm.words import Say
from tests.support import checkpoints, company, tiny
from tests.support.answers import tokens_of
from tests.support.processes import until

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="Falta una GPU Nvidia que torch vea"),
]
GPU = torch.device("cuda")
NEW = 40
GREEDY = Sampling(temperature=0)
ALIBI: dict[str, Any] = {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False}
WITH_POSITIONS = {"n_positions": tiny.CONTEXT}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon": ("Falcon", ALIBI | {"new_decoder_architecture": False}),
    "llama": ("Llama", {"num_key_value_heads": 2}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 16}),
    "mistral": ("Mistral", {"num_key_value_heads": 2, "sliding_window": None}),
    "gemma3": ("Gemma3", {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": tiny.CONTEXT}),
    "phi": ("Phi", {}),
    "phi3": ("Phi3", {"num_key_value_heads": 2}),
    "gpt_neox": ("GPTNeoX", {}),
    "gpt2": ("GPT2", WITH_POSITIONS),
}
LAST = {"olmoe": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2})}
"""A capture that fails can leave torch unable to capture another one in this process."""


def network(name: str, size: dict[str, Any] = tiny.SIZE) -> PreTrainedModel:
    torch.manual_seed(0)
    prefix, options = (ARCHITECTURES | LAST)[name]
    kind = {"GPT2": "GPT2LMHeadModel"}.get(prefix, f"{prefix}ForCausalLM")
    config = getattr(transformers, {"Gemma3": "Gemma3TextConfig"}.get(prefix, f"{prefix}Config"))
    result: PreTrainedModel = getattr(transformers, kind)(config(**options | size))
    return result


def prompts(number: int, longest: int = tiny.CONTEXT - NEW - 1) -> list[list[int]]:
    rng = random.Random(1)
    lengths = [rng.choice([1, 2, 7, 16, 17, 33, 100, longest]) for _ in range(number)]
    return [[rng.randrange(2, tiny.WORDS) for _ in range(length)] for length in lengths]


def answers(engine: Engine, requests: list[Request]) -> list[list[int]]:
    """Asked all at once."""
    with ThreadPoolExecutor(len(requests)) as clients:
        return [*clients.map(lambda request: tokens_of(engine.generate(request)), requests)]


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """In float32, not in TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture(autouse=True)
def kernel_check(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, whose right kernels are used however fast they are: those of a small model take as long as their
    launch."""
    from llm.devices import kernel_check  # imports Triton

    monkeypatch.setattr(
        kernel_check.Candidate, "earns_its_place", lambda candidate, seconds, say: candidate.agrees(say)
    )
    return kernel_check


def engine_of(folder: Path, dtype: torch.dtype, rows: int = 8) -> Engine:
    model = Model.read(folder, dtype, say=print)
    model.stop_ids = frozenset()
    engine = Engine(model, rows, prefill_chunk=128, say=print)
    engine.start()
    return engine


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.inference_mode()
def test_in_bfloat16_each_token_is_about_the_likeliest(tmp_path: Path, name: str) -> None:
    """Ties are broken by rounding: a token may be another than that of float32, but hardly less likely."""
    if not is_ampere(GPU):
        pytest.skip("this GPU does not compute in bfloat16")
    engine = engine_of(tiny.save(tmp_path, network(name)), torch.bfloat16)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval().to(GPU)
    asked = prompts(24)
    missed: list[Tensor] = []
    for prompt, answer in zip(asked, answers(engine, [Request(p, NEW, GREEDY) for p in asked]), strict=True):
        logits = plain(torch.tensor([prompt + answer], device=GPU)).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(answer, device=GPU)[:, None])[:, 0]
        missed.append((logits.max(-1).values - chosen) / logits.std(-1))
    # in standard deviations of the logits; random ids miss by two and more
    assert torch.cat(missed).median() < 0.05 and torch.cat(missed).quantile(0.95) < 0.5
    assert engine._model.ragged, "as in the interpreter; the lines above say why not"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_same_seed_gives_the_same_text_and_cancels_leave_no_row(tmp_path: Path, dtype: torch.dtype) -> None:
    engine = engine_of(tiny.save(tmp_path, network("llama")), dtype)
    requests = [Request(prompt, NEW, Sampling(0.9, 0.95, 50, 1.1, i)) for i, prompt in enumerate(prompts(12))]
    alone = [tokens_of(engine.generate(request)) for request in requests]
    assert [tokens_of(engine.generate(request)) for request in requests] == alone
    rng = random.Random(0)
    for _ in range(20):
        generations = [engine.generate(request) for request in requests]
        for generation in generations:
            if rng.random() < 0.5:
                generation.cancel()
            else:
                tokens_of(generation)
    until(lambda: not engine.running)
    assert [tokens_of(engine.generate(request)) for request in requests] == alone


@pytest.mark.parametrize("name", ["falcon", "llama"])
def test_where_it_is_asked_for_tokens_and_logits_do_not_depend_on_company(tmp_path: Path, name: str) -> None:
    """200 requests of 1 to 1,500 tokens, alone, then arriving at random beside others that are cancelled."""
    if not is_ampere(GPU):
        pytest.skip("this GPU has no kernels")
    # heads, layers and outputs as of falcon-rw-1b and of a Llama with as many parameters, with fewer layers
    if name == "falcon":
        folder = checkpoints.falcon(tmp_path / name, layers=4, width=2048, heads=32)
    else:
        size = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 4, "num_attention_heads": 32}
        sizes = tiny.SIZE | size | {"max_position_embeddings": 2048, "initializer_range": 0.02}
        torch.manual_seed(0)
        llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=4))
        folder = tiny.save(tmp_path / name, llama)
    lines: list[str] = []
    model = Model.read(folder, torch.bfloat16, say=lines.append, batch_invariant=True)
    assert model.batch_invariant, lines
    model.stop_ids = frozenset()
    lengths = (1, 2, 15, 16, 17, 33, 64, 100, 257, 700, 1500)
    compared = company.compare(model, count=200, most_tokens=60, context=1600, lengths=lengths)
    assert compared == {"tokens": 200, "logits": 200, "requests": 200}


@pytest.mark.parametrize("gigabytes", [15.8, 23.6])
def test_bursts_of_the_longest_prompts_fit_on_a_smaller_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gigabytes: float
) -> None:
    """A falcon-rw-1b's cache and passes, with few layers' weights, on a GPU that says it has less memory."""
    folder = checkpoints.falcon(tmp_path / "falcon", layers=24, width=2048, heads=32)
    memory = torch.cuda.mem_get_info
    total, limit = memory()[1], int(gigabytes * 1e9)
    if total < limit:
        pytest.skip("this GPU is smaller")
    before, own = memory()[0], int(0.5e9)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (limit - own - (before - memory()[0]), limit))
    torch.cuda.set_per_process_memory_fraction((limit - own) / total)
    try:
        model = Model.read(folder, torch.bfloat16)
        model.stop_ids = frozenset()
        engine = Engine(model, 32, say=print)
        engine.start()
        assert "capture" in engine.seconds, "the memory that is left is enough for the graphs"
        for lengths, new in [([2040, *[60] * 31], 8), ([1900] * 32, 60), ([125] * 40, 30), ([1000, 100, 10] * 12, 40)]:
            requests = [Request([5] * length, new, Sampling(seed=i)) for i, length in enumerate(lengths)]
            assert [len(answer) for answer in answers(engine, requests)] == [new] * len(lengths)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_in_float32_the_texts_are_generates(tmp_path: Path, name: str) -> None:
    engine = engine_of(tiny.save(tmp_path, network(name)), torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval().to(GPU)
    asked = prompts(24)
    for prompt, answer in zip(asked, answers(engine, [Request(p, NEW, GREEDY) for p in asked]), strict=True):
        ids = torch.tensor([prompt], device=GPU)
        expected = plain.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NEW,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert answer == expected[0, len(prompt) :].tolist()


def measured(candidate: Any, seconds: Callable[[Any], float], say: Say) -> Any:
    """Instead of Candidate.earns_its_place: prints what each kernel does. Returns whether it is right."""
    kernel, operations = candidate.errors()
    took, operations_took = (f"{seconds(step) * 1e6:.1f} µs" for step in (candidate.kernel, candidate.operations))
    print(f"{candidate.name}: {took}, PyTorch {operations_took}; error {kernel:.2g}, PyTorch {operations:.2g}")
    return candidate.agrees(say)


@pytest.mark.parametrize("name", ["falcon", "llama"])
@torch.inference_mode()
def test_all_kernels_are_right_at_full_size(monkeypatch: pytest.MonkeyPatch, kernel_check: Any, name: str) -> None:
    """At the sizes of falcon-rw-1b, and of Llama-3.2-1B."""
    if not is_ampere(GPU):
        pytest.skip("this GPU does not compute in bfloat16")
    monkeypatch.setattr(kernel_check.Candidate, "earns_its_place", measured)
    size = {"hidden_size": 2048, "num_attention_heads": 32, "vocab_size": 50304, "num_hidden_layers": 24}
    if name == "llama":
        size |= {"num_key_value_heads": 8, "intermediate_size": 8192, "vocab_size": 128256, "num_hidden_layers": 16}
    avoid_cudnn_attention()
    with GPU:
        full = network(name, size).bfloat16().eval()
    fuse_biases(full)
    wrong: list[str] = []
    layers, of = kernel_check.layers(full, say=wrong.append)
    heads = Heads(32, 1 if name == "falcon" else 4, 64, torch.bfloat16)
    attends = kernel_check.attention(heads, 2048, name == "falcon", GPU, say=wrong.append)
    assert wrong == [] and layers == of and attends


@pytest.mark.parametrize("name", LAST)
def test_in_float32_these_too(tmp_path: Path, name: str) -> None:
    test_in_float32_the_texts_are_generates(tmp_path, name)


@pytest.mark.parametrize("name", LAST)
def test_in_bfloat16_these_too(tmp_path: Path, name: str) -> None:
    test_in_bfloat16_each_token_is_about_the_likeliest(tmp_path, name)
