"""A model is tried at start: where its texts would not be `generate`'s, the context ends or the model is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BartConfig,
    BartForCausalLM,
    CpmAntConfig,
    CpmAntForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
)

from llm.devices.linear import Float32Linear
from llm.devices.model import Model
from llm.engine import trial
from llm.engine.engine import Engine
from llm.errors import UserError
from llm.words import unsaid
from tests.support import checkpoints
from tests.support.tiny import CONTEXT, SIZE, WORDS, assert_texts_are_generates, save

packed = pytest.mark.skipif(not Float32Linear.is_fast(), reason="this is no x86 processor with AVX2, or no Linux")
BOUNDARY = 64

LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 4.0,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
}


def gpt_neo(boundary: int = BOUNDARY) -> PreTrainedModel:
    layers: Any = [[["global", "local"], 1]]
    return GPTNeoForCausalLM(
        GPTNeoConfig(
            vocab_size=WORDS,
            initializer_range=0.3,
            hidden_size=64,
            num_layers=2,
            num_heads=4,
            attention_types=layers,
            window_size=boundary,
            max_position_embeddings=CONTEXT,
        )
    )


def llama(context: int = CONTEXT, boundary: int = BOUNDARY, **rope: Any) -> PreTrainedModel:
    parameters: Any = {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": boundary, **rope}
    return LlamaForCausalLM(LlamaConfig(**{**SIZE, "max_position_embeddings": context}, rope_parameters=parameters))


def phi3() -> PreTrainedModel:
    rope: Any = {**LONGROPE, "original_max_position_embeddings": BOUNDARY}
    return Phi3ForCausalLM(Phi3Config(**SIZE, original_max_position_embeddings=BOUNDARY, rope_parameters=rope))


def bart() -> PreTrainedModel:
    return BartForCausalLM(
        BartConfig(
            vocab_size=WORDS,
            init_std=0.3,
            d_model=64,
            decoder_layers=2,
            decoder_attention_heads=4,
            decoder_ffn_dim=96,
            max_position_embeddings=CONTEXT,
        )
    )


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=["float32", "bfloat16"]
)


@DTYPES
@pytest.mark.parametrize("network", [gpt_neo, phi3, lambda: llama(**LONGROPE)], ids=["gpt-neo", "phi3", "llama"])
def test_the_context_ends_where_other_rows_would_change_a_text(
    network: Any, dtype: torch.dtype, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """GPT-Neo's local attention counts from the cache's length; in a longrope the longest row decides the rotation."""
    folder = save(tmp_path / "model", network())
    engine = Engine(Model.read(folder, dtype), 4, say=print)
    assert engine.context == BOUNDARY
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "contexto" in line]
    assert line.startswith(f"El contexto acaba en {BOUNDARY} tokens y no en {CONTEXT}: más allá, ")
    assert line.endswith(" calcula otro texto cuando atiende varias preguntas a la vez")
    if dtype == torch.float32:
        assert_texts_are_generates(folder, engine, 5, BOUNDARY - 12)


@DTYPES
def test_a_model_whose_forward_takes_no_positions_is_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    model = Model.read(save(tmp_path / "model", bart()), dtype)
    with pytest.raises(UserError, match=r"^BartForCausalLM calcula otro texto .* a la vez: use otro modelo \(Falcon"):
        Engine(model, 4, say=print)


def test_a_model_whose_pass_fails_is_refused(tmp_path: Path) -> None:
    """CPM-Ant puts tokens of its own before the prompt."""
    config = CpmAntConfig(
        vocab_size=WORDS,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        dim_head=16,
        dim_ff=32,
    )
    model = Model.read(save(tmp_path / "model", CpmAntForCausalLM(config)), torch.float32)
    with pytest.raises(
        UserError, match=r"^CpmAntForCausalLM no sabe atender varias .* \(The expanded size.*\): use otro"
    ):
        Engine(model, 4, say=print)


@packed
def test_attention_that_depends_on_how_far_a_key_lies_reads_prompts_of_one_start_in_a_pass(tmp_path: Path) -> None:
    model = Model.read(save(tmp_path / "model", llama().bfloat16()), torch.float32, layout=Float32Linear)
    assert trial.agreeing(model, unsaid).mixes_starts

    def distant(module: Any, args: Any, kwargs: Any) -> Any:
        sees = kwargs["attention_mask"]
        if sees is None:
            size = kwargs["hidden_states"].shape[1]
            sees = torch.ones(1, 1, size, size, dtype=torch.bool).tril()
        position = sees.sum(-1, keepdim=True) - 1
        distance = position - torch.arange(sees.shape[-1])
        bias = distance.abs().sqrt().neg().masked_fill(~sees, -torch.inf)
        return args, {**kwargs, "attention_mask": bias}

    for layer in model.network.model.layers:
        layer.self_attn.register_forward_pre_hook(distant, with_kwargs=True)
    assert not trial.agreeing(model, unsaid).mixes_starts


@packed
def test_a_layer_that_is_not_like_llamas_keeps_the_operations_of_transformers(tmp_path: Path) -> None:
    model = Model.read(save(tmp_path / "model", llama().bfloat16()), torch.float32, layout=Float32Linear)
    assert trial.agreeing(model, unsaid).mixes_starts
    for layer in model.network.model.layers:
        layer.mlp.register_forward_hook(lambda *args: 2 * args[-1])
    lines: list[str] = []
    assert trial.agreeing(model, lines.append).mixes_starts
    assert lines == ["LlamaForCausalLM va con las operaciones de transformers, más despacio: si no, calcula otro texto"]


@packed
def test_a_model_that_changes_the_inputs_of_joined_layers_is_refused(tmp_path: Path) -> None:
    model = Model.read(save(tmp_path / "model", llama().bfloat16()), torch.float32, layout=Float32Linear)

    def doubled(module: Any, inputs: tuple[torch.Tensor]) -> None:
        inputs[0].mul_(2)

    for layer in model.network.model.layers:
        layer.self_attn.k_proj.register_forward_pre_hook(doubled)
    with pytest.raises(UserError, match=r"^LlamaForCausalLM calcula otro texto"):
        Engine(model, 4)


def test_a_boundary_too_far_to_be_tried_ends_the_context(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = llama(context=1 << 20, boundary=1 << 16, rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0)
    engine = Engine(Model.read(save(tmp_path / "model", network), torch.float32), 4, say=print)
    assert engine.context == 1 << 16
    line = (
        "El contexto acaba en 65536 tokens y no en 1048576: más allá, LlamaForCausalLM no se puede comprobar al cargar"
    )
    assert line in capsys.readouterr().out.splitlines()


@DTYPES
@pytest.mark.parametrize("kind", ["falcon", "llama", "llama3"])
def test_a_model_that_agrees_keeps_its_context(
    kind: str, dtype: torch.dtype, falcon: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Llama 3's scaled frequencies are the same for each row."""
    if kind == "falcon":
        folder = falcon
    elif kind == "llama":
        folder = checkpoints.llama(tmp_path / "model", layers=6)
    else:
        rope: dict[str, Any] = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        folder = save(tmp_path / "model", llama(**rope))
    model = Model.read(folder, dtype)
    modules, context = [*model.network.modules()], model.context
    engine = Engine(model, 4, say=print)
    assert engine.context == context
    assert [*model.network.modules()] == modules
    assert "contexto" not in capsys.readouterr().out
    if kind == "llama3" and dtype == torch.float32:
        assert_texts_are_generates(folder, engine, 5, BOUNDARY + 40)


def test_a_sliding_window_ends_the_context_and_a_line_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save(
        tmp_path / "model", MistralForCausalLM(MistralConfig(**SIZE, num_key_value_heads=2, sliding_window=BOUNDARY))
    )
    engine = Engine(Model.read(folder, torch.float32, say=print), 4, say=print)
    assert engine.context == BOUNDARY
    assert (
        capsys.readouterr()
        .out.splitlines()
        .count(f"La atención del modelo ve una ventana de {BOUNDARY} tokens: el contexto acaba ahí y no en {CONTEXT}")
        == 1
    )
    assert_texts_are_generates(folder, engine, 5, BOUNDARY - 12)
