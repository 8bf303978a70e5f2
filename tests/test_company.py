"""A text depends on its own inputs alone: not on who else asks, nor on how its prompt is read."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm.devices import attention, cgroups, forward, linear
from llm.devices.model import Model
from llm.devices.padding import RowPadding
from llm.devices.threads import Threads
from llm.weights import checkpoint
from llm.weights.settings import Settings
from tests.support import company

slow = pytest.mark.slow
HEADS = attention.Heads(number=4, group=2, size=64, dtype=torch.float32)
each_layout = pytest.mark.parametrize("layout", [linear.BFloat16Linear, linear.Float32Linear])


def assert_bits_do_not_depend_on_company(
    folder: Path, layout: type[linear.PackedLinear], count: int, most_tokens: int
) -> None:
    if not layout.is_fast():
        pytest.skip(f"this processor does not compute with {layout.__name__}")
    model = Model.read(folder, layout.dtype, layout=layout)
    if not model.batch_invariant:
        pytest.skip("this processor has no numbers of rows that agree, and setup says so")
    compared = company.compare(model, count, most_tokens)
    assert compared == {"tokens": count, "logits": count, "requests": count}


@pytest.fixture(scope="module")
def two_layers(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with the first two of its thirty layers: the same weights and shapes."""
    folder = tmp_path_factory.mktemp("weights") / demo_folder.name
    folder.mkdir()
    for path in demo_folder.iterdir():
        (folder / path.name).symlink_to(path)
    config = json.loads((demo_folder / "config.json").read_text()) | {"num_hidden_layers": 2}
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@slow
@each_layout
def test_the_bits_of_a_small_falcon_do_not_depend_on_company(
    bfloat16_folder: Path, layout: type[linear.PackedLinear]
) -> None:
    assert_bits_do_not_depend_on_company(bfloat16_folder, layout, count=30, most_tokens=24)


@slow
@each_layout
def test_the_bits_of_the_embedded_models_layers_do_not_depend_on_company(
    two_layers: Path, layout: type[linear.PackedLinear]
) -> None:
    assert_bits_do_not_depend_on_company(two_layers, layout, count=12, most_tokens=8)


@slow
@each_layout
def test_nor_with_three_threads_which_cut_tensors_at_odd_places(
    two_layers: Path, layout: type[linear.PackedLinear], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 3)
    monkeypatch.setattr(cgroups, "processors", lambda: 3)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2})
    monkeypatch.setattr(Threads, "fit", lambda self: None)
    assert_bits_do_not_depend_on_company(two_layers, layout, count=6, most_tokens=4)


@slow
def test_in_float32_the_tokens_do_not_depend_on_company(small_falcon: Path) -> None:
    assert company.compare(Model.read(small_falcon, torch.float32), count=20, most_tokens=24)["tokens"] == 20


def padding(sums: Callable[[int, int], int], numbers: tuple[int, ...], reference: int) -> RowPadding:
    """Of a processor where the row at `place` of `rows` is summed in the order `sums(rows, place)`."""
    weight = torch.randn(512, 128, generator=torch.Generator().manual_seed(0)).bfloat16()

    def product(x: Tensor, bias: Tensor | None) -> Tensor:
        rows = []
        for place, row in enumerate(x):
            order = torch.randperm(512, generator=torch.Generator().manual_seed(sums(len(x), place)))
            total = torch.zeros(128) if bias is None else bias.float()
            for part in (row[order, None].float() * weight[order].float()).split(8):
                total = total + part.sum(0)
            rows.append(total.bfloat16())
        return torch.stack(rows)

    layer = SimpleNamespace(buffer=torch.zeros(1, 1, 512), of_all=product)
    return RowPadding(layer, numbers, [reference])


def test_rows_are_filled_up_only_where_the_processor_would_give_other_bits() -> None:
    asked = padding(lambda rows, place: int(rows > 16), numbers=(4, 8, 16, 32), reference=4)
    assert asked.batch_invariant and asked.most == 16
    # fewer than four are slower
    assert [asked[rows] for rows in (1, 4, 5, 9, 16)] == [4, 4, 5, 9, 16]


def test_rows_are_filled_up_to_a_number_that_agrees_with_the_reference() -> None:
    asked = padding(lambda rows, place: 0 if rows in (16, 32) else rows, numbers=(4, 8, 16, 32), reference=32)
    assert asked.batch_invariant and asked.most == 32
    assert [asked[rows] for rows in (1, 8, 16, 17, 31)] == [16, 16, 16, 32, 32]


def test_a_processor_where_the_place_matters_has_no_number_of_rows_that_agrees() -> None:
    asked = padding(lambda rows, place: place, numbers=(4, 8), reference=4)
    assert not asked.batch_invariant
    assert [asked[rows] for rows in (3, 5)] == [4, 8]


def test_threads_that_sum_otherwise_do_not_keep_the_bits(thread_count: None) -> None:
    torch.set_num_threads(2)
    asked = padding(lambda rows, place: torch.get_num_threads(), numbers=(4, 8), reference=4)
    assert asked.batch_invariant and asked.agrees_now()
    torch.set_num_threads(1)
    assert not asked.agrees_now()


def test_attention_is_asked_with_both_numbers_of_threads(thread_count: None, monkeypatch: pytest.MonkeyPatch) -> None:
    attend = attention.attend

    def by_threads(*args: Any, **kwargs: Any) -> Tensor:
        return attend(*args, **kwargs) + torch.get_num_threads()

    monkeypatch.setattr(attention, "attend", by_threads)
    torch.set_num_threads(1)
    tile = attention.batch_invariant_tile(HEADS)
    assert tile
    assert attention.agrees(tile, HEADS, threads=1)
    assert not attention.agrees(tile, HEADS, threads=2)
    assert torch.get_num_threads() == 1


@slow
@pytest.mark.parametrize("agrees", [True, False])
def test_setup_says_where_company_can_change_a_text(
    agrees: bool, bfloat16_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not linear.layout(chosen=None):
        pytest.skip("this processor has no layout of its own")
    monkeypatch.setattr(RowPadding, "_agrees", lambda self, rows: agrees)
    monkeypatch.setattr(attention, "agrees", lambda *args: agrees)
    settings = Settings(bfloat16_folder.name, None, bfloat16_folder.parent, None, None)
    model = Model.load(checkpoint.verify(settings), settings, print)
    assert model.batch_invariant == agrees
    line = "En este procesador un texto puede cambiar según qué otras preguntas haya a la vez\n"
    assert (line in capsys.readouterr().out) != agrees


@pytest.mark.parametrize(("needed", "tile"), [(8, 8), (32, 32), (64, None)])
def test_attentions_tiles_are_padded_to_what_the_processor_needs(
    needed: int, tile: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "agrees", lambda tile, *args: tile == needed)
    assert attention.batch_invariant_tile(HEADS) == tile


def test_attention_is_asked_for_what_could_change_it(monkeypatch: pytest.MonkeyPatch) -> None:
    # torch's own takes queries and keys in blocks from where a pass begins
    def torchs(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, prefill: forward.Pass | None) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)

    monkeypatch.setattr(attention, "attend", torchs)
    assert attention.batch_invariant_tile(HEADS) is None
