"""On an x86 CPU without bfloat16 instructions weights are in 16 bits, the rest in float32: the text is float32's."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    XGLMConfig,
    XGLMForCausalLM,
)

from llm.devices import activation, forward, linear, processor
from llm.devices.linear import Float32Linear
from llm.devices.model import Model
from llm.engine.engine import Engine
from llm.weights import checkpoint
from llm.weights.settings import Settings
from tests.support import checkpoints
from tests.support.tiny import CONTEXT, SIZE, WORDS, assert_texts_are_generates, save

pytestmark = pytest.mark.skipif(not Float32Linear.is_fast(), reason="this is no x86 processor with AVX2, or no Linux")


def read(folder: Path) -> Model:
    return Model.read(folder, torch.float32, layout=Float32Linear)


def gpt2() -> PreTrainedModel:
    """Its layers are Conv1D, with transposed weights."""
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=WORDS, initializer_range=0.3, n_embd=64, n_layer=2, n_head=4, n_positions=CONTEXT)
    )


def opt() -> PreTrainedModel:
    """With a table of positions, biases, and projections around its layers."""
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=WORDS,
            init_std=0.3,
            hidden_size=64,
            ffn_dim=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
            word_embed_proj_dim=32,
        )
    )


def xglm() -> PreTrainedModel:
    """Computes a table of positions when it is made, in the dtype of the weights."""
    return XGLMForCausalLM(
        XGLMConfig(
            vocab_size=WORDS,
            init_std=0.3,
            d_model=64,
            ffn_dim=96,
            num_layers=2,
            attention_heads=4,
            max_position_embeddings=CONTEXT,
        )
    )


def gemma() -> PreTrainedModel:
    """Scales its embeddings."""
    return GemmaForCausalLM(GemmaConfig(**SIZE, num_key_value_heads=2, head_dim=16))


def mixtral() -> PreTrainedModel:
    """Has experts, which are no linear layers."""
    return MixtralForCausalLM(MixtralConfig(**SIZE, num_key_value_heads=2, num_local_experts=4))


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SIZE, num_key_value_heads=2))


def qwen3() -> PreTrainedModel:
    """Norms each head's queries and keys."""
    return Qwen3ForCausalLM(Qwen3Config(**SIZE, num_key_value_heads=2, head_dim=32))


def olmo() -> PreTrainedModel:
    """Its norms have no weights: once its layers are packed no parameter is left."""
    return OlmoForCausalLM(OlmoConfig(**SIZE))


@pytest.mark.parametrize("make", [llama, qwen3, gpt2, opt, gemma, mixtral, xglm, olmo])
def test_the_text_is_that_of_transformers_in_float32(make: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = save(tmp_path / "model", make().bfloat16())
    model = read(folder)
    assert any(isinstance(module, Float32Linear) for module in model.network.modules())
    # an expert's products depend on how many tokens it gets; XGLM's attention is its own
    assert model.batch_invariant == (make not in (mixtral, xglm))
    assert_texts_are_generates(folder, Engine(model, 4), 1, 3, 20, 40)


def test_layers_of_one_product_may_be_called_with_other_inputs(tmp_path: Path) -> None:
    network: Any = llama().bfloat16()
    attention = read(save(tmp_path / "model", network)).network.model.layers[0].self_attn
    plain = network.float().model.layers[0].self_attn
    one, other = torch.randn(2, 3, 5, SIZE["hidden_size"])
    with torch.inference_mode(), forward.run(forward.Pass(length=5, start=0, rows=slice(3))):
        for name, x in (("q_proj", one), ("k_proj", other), ("v_proj", one), ("v_proj", other), ("k_proj", one)):
            torch.testing.assert_close(getattr(attention, name)(x), getattr(plain, name)(x))


def test_logits_are_nearly_as_exact_as_float32s(bfloat16_folder: Path) -> None:
    """The mean squared error stays below four times that of float32's own rounding."""
    text = torch.randint(0, checkpoints.FEW, (1, 150), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        exact, plain = (
            AutoModelForCausalLM.from_pretrained(bfloat16_folder, dtype=dtype).eval()(text).logits.double()
            for dtype in (torch.float64, torch.float32)
        )
        ours = read(bfloat16_folder).network(text).logits.double()
    assert (ours - exact).square().mean() < 4 * (plain - exact).square().mean()


@pytest.mark.parametrize(
    ("trained", "precision"),
    [
        (torch.float16, "float16, con las cuentas en float32"),
        (torch.float32, "float32"),
    ],
)
def test_weights_keep_their_values_in_any_dtype(trained: torch.dtype, precision: str, tmp_path: Path) -> None:
    folder = checkpoints.falcon(tmp_path / "falcon", dtype=trained)
    model = read(folder)
    assert (model.packed, model.batch_invariant, model.precision) == (True, True, precision)
    text = torch.randint(0, checkpoints.FEW, (1, 50), generator=torch.Generator().manual_seed(1))
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        torch.testing.assert_close(model.network(text).logits, plain(text).logits, rtol=1e-4, atol=1e-4)


def test_a_float32_checkpoint_of_bfloat16_values_takes_their_memory(bfloat16_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(bfloat16_folder, folder)
    weights = {name: weight.float() for name, weight in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert read(folder).precision == "bfloat16, con las cuentas en float32"

    weights["transformer.h.1.mlp.dense_h_to_4h.weight"][3, 5] = 1 / 3
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert read(folder).precision == "bfloat16 y float32, con las cuentas en float32"


def test_the_dtype_is_the_one_of_the_weights_whatever_config_json_says(bfloat16_folder: Path, tmp_path: Path) -> None:
    """In config.json's float16 a weight of 70,000 would be infinite."""
    name, folder = "transformer.h.1.mlp.dense_h_to_4h.weight", tmp_path / "changed"
    shutil.copytree(bfloat16_folder, folder)
    weights = load_file(folder / "model.safetensors")
    weights[name][3, 5] = 70000
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"bfloat16"', '"float16"'))
    network: Any = read(folder).network
    x = torch.zeros(1, network.config.hidden_size)
    x[0, 5] = 1
    bias = weights[name.replace("weight", "bias")][3].float()
    assert network.transformer.h[1].mlp.dense_h_to_4h(x)[0, 3] == torch.tensor(70000).bfloat16().float() + bias


@pytest.mark.parametrize("missing", ["flags", "GNU's OpenMP"])
def test_elsewhere_models_are_in_float32(missing: str, bfloat16_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Arm, on macOS, on an old x86 processor."""
    monkeypatch.setattr(linear.BFloat16Linear, "is_fast", lambda: False)
    assert linear.layout(chosen=None) is Float32Linear
    if missing == "flags":
        monkeypatch.setattr(processor, "flags", lambda: {"fp", "asimd", "avx2"})
    else:
        monkeypatch.setattr(processor, "openmp", lambda: None)
    monkeypatch.setattr(processor, "runs_kernels", processor.runs_kernels.__wrapped__)
    lines: list[str] = []
    settings = Settings(bfloat16_folder.name, None, bfloat16_folder.parent, None, None)
    model = Model.load(checkpoint.verify(settings), settings, lines.append)
    assert (model.precision, model.packed) == ("float32", False)


@pytest.mark.parametrize(
    ("dtype", "precision"), [(None, "bfloat16, con las cuentas en float32"), ("float32", "float32")]
)
def test_the_log_names_the_precision_and_the_user_can_choose_it(
    dtype: str | None, precision: str, bfloat16_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear.BFloat16Linear, "is_fast", lambda: False)
    lines: list[str] = []
    settings = Settings(bfloat16_folder.name, None, bfloat16_folder.parent, None, dtype)
    model = Model.load(checkpoint.verify(settings), settings, lines.append)
    assert model.packed == (dtype is None)
    (line,) = [line for line in lines if line.startswith("Modelo: ")]
    assert line.endswith(f" millones de parámetros en {precision}")


@pytest.mark.parametrize("threads", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("name", ["silu", "gelu_pytorch_tanh", "gelu"])
def test_an_activation_has_the_same_bits_wherever_threads_cut_the_tensor(
    name: str, threads: int, thread_count: None
) -> None:
    from transformers.activations import ACT2FN

    function = activation.BatchInvariantActivation(ACT2FN[name])
    torch.set_num_threads(threads)
    for width in (1536, 2048, 1537, 40):
        x = torch.randn(200, width, generator=torch.Generator().manual_seed(0))
        alone = torch.cat([function(row) for row in x.split(1)])
        torch.testing.assert_close(alone, ACT2FN[name](x))
        part_of_a_product = torch.cat([x, x], -1)[:, :width]
        for tokens in (3, 34, 77, 200):
            assert torch.equal(function(x[:tokens]), alone[:tokens])
            assert torch.equal(function(part_of_a_product[:tokens]), alone[:tokens])


LOADING = """
import sys, threading
from pathlib import Path
import torch
from llm.devices.linear import Float32Linear
from llm.devices.model import Model

def memory():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) * 1024

def watch():
    while not loaded.wait(0.002):
        samples.append(memory())

folder, loaded, before = Path(sys.argv[1]), threading.Event(), memory()
samples = [before]
watcher = threading.Thread(target=watch)
watcher.start()
model = Model.read(folder, torch.float32, layout=Float32Linear)
loaded.set()
watcher.join()
print((max(samples) - before) / (folder / "model.safetensors").stat().st_size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_loading_holds_no_second_copy_of_all_weights(tmp_path: Path) -> None:
    wide: Any = SIZE | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6}
    folder = save(tmp_path / "model", LlamaForCausalLM(LlamaConfig(**wide)).bfloat16())

    command = [sys.executable, "-c", LOADING, str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    # without the mapped file: the weights once, and the layer that is being packed
    assert 0.8 < float(run.stdout) < 1.8
