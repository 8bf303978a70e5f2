"""The operations of the GPU path, without a GPU: meta tensors have a GPU's shapes and devices, and compute nothing."""

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from weakref import WeakSet

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import FalconConfig, FalconForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from llm.devices import gpu
from llm.devices import model as model_module
from llm.devices.model import Model, Room
from llm.engine import runner
from llm.engine.runner import Runner
from llm.engine.scheduler import Chunk
from llm.engine.sequence import Request, Sampling, Sequence
from tests.support import checkpoints

META = torch.device("meta")
CONTEXT = 2048
READS = {"item", "_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select"}
"""Operations that make the host wait for the device."""
DRAWN = Sampling(0.7, 0.95, 50, 1.1, 3)


class Watch(TorchDispatchMode):
    """Records the operations that a capture forbids, or that the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.forbidden: list[str] = []
        self.copies: list[bool] = []
        """Of each copy from the host to the device, whether it is non-blocking."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        result = func(*args, **(kwargs or {}))
        inputs = {leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        outputs = {leaf.device.type for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)}
        if name in READS and "meta" in inputs:
            self.forbidden.append(name)
        elif "cpu" in inputs and "meta" in outputs:
            self.copies.append((kwargs or {}).get("non_blocking", False) or True in args[2:])
        elif {"cpu", "meta"} <= inputs | outputs:
            self.forbidden.append(name)
        return result

    def __enter__(self) -> "Watch":
        self._assignments = Assignments(self.forbidden)
        self._assignments.__enter__()
        return super().__enter__()  # type: ignore[no-any-return]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._assignments.__exit__(*error)


class Assignments(TorchFunctionMode):
    """Records copies of numbers from unpinned memory, which torch makes on CUDA alone, unseen by a dispatch mode."""

    def __init__(self, forbidden: list[str]) -> None:
        super().__init__()
        self._forbidden = forbidden

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.__setitem__ and not isinstance(args[2], torch.Tensor) and args[0].device == META:
            self._forbidden.append("setitem")
        if func is torch.tensor and torch.device(kwargs.get("device", "cpu")) == META:
            self._forbidden.append("tensor")
        return func(*args, **kwargs)


class Unread:
    """Replaces PendingIds, whose `read` is the one wait that is intended."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.rows = rows

    def copy(self, ids: torch.Tensor) -> None:
        assert ids.shape == (self.rows,)


def network(kind: str, layers: int = 2, width: int = 128, heads: int = 4) -> PreTrainedModel:
    """On the meta device, in bfloat16."""
    with META:
        if kind == "falcon":
            falcon = FalconConfig(
                vocab_size=checkpoints.VOCABULARY,
                hidden_size=width,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                alibi=True,
                bias=True,
                multi_query=False,
                parallel_attn=False,
                new_decoder_architecture=False,
            )
            return FalconForCausalLM(falcon).bfloat16().eval()  # type: ignore[no-any-return]
        llama = LlamaConfig(
            vocab_size=checkpoints.TOKENS,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2,
            max_position_embeddings=CONTEXT,
        )
        return LlamaForCausalLM(llama).bfloat16().eval()  # type: ignore[no-any-return]


def model_of(network: PreTrainedModel, device: torch.device = META, token_bytes: int = 1) -> Model:
    return Model(
        network=network,
        tokenizer=None,  # type: ignore[arg-type]  # no text here
        device=device,
        spread=False,
        context=CONTEXT,
        vocabulary=checkpoints.TOKENS,
        stop_ids=frozenset(),
        layers=network.config.num_hidden_layers,
        parameters=network.num_parameters(),
        precision="bfloat16",
        token_bytes=Counter({device: token_bytes}),
    )


@pytest.fixture(params=["falcon", "llama"])
def runner_on_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runner]:
    """A runner of eight rows: three are prefilled, and one has read a chunk of its prompt."""
    monkeypatch.setattr(runner, "PendingIds", Unread)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    with torch.inference_mode():
        filled = Runner(model_of(network(request.param)), 8, capture=lambda step: step)
        filled.cuda = True
        for prompt, read in ((7, 7), (300, 300), (20, 20), (40, 16)):
            filled.prefill([Chunk(put(filled, prompt), 0, read)])
        yield filled


def put(runner: Runner, prompt: int, sampling: Sampling = DRAWN) -> Sequence:
    """A sequence with so many ids, in a row."""
    sequence = Sequence(Request([5] * prompt, 1, sampling), budget=1)
    runner.put(sequence)
    return sequence


def test_a_captured_step_copies_nothing_from_or_to_the_host(runner_on_gpu: Runner) -> None:
    for rows, length in ((1, 256), (8, 2048)):
        for width in (0, 128, checkpoints.TOKENS):
            with Watch() as watch:
                runner_on_gpu._forward(rows, length)
                runner_on_gpu._choose(rows, [width])
            assert watch.forbidden == [] and watch.copies == []


@pytest.mark.parametrize(
    ("step", "copies"),
    [
        (lambda r: put(r, 30), 1),
        (lambda r: r.prefill([Chunk(r.rows[3], 16, 24)]), 1),
        (lambda r: r.decode(), 0),
        (lambda r: r._move(r.rows[2], 5), 0),
        (lambda r: r.release(r.rows[2]), 0),
        (lambda r: r.clear(r.rows[2]), 0),
    ],
    ids=["put", "prefill", "decode", "move", "release", "clear"],
)
def test_only_the_reading_of_ids_waits_for_the_device(
    runner_on_gpu: Runner, step: Callable[[Runner], object], copies: int
) -> None:
    with Watch() as watch:
        step(runner_on_gpu)
    assert watch.forbidden == []
    assert watch.copies == [True] * copies, "lists travel from pinned memory, numbers in a kernel's arguments"


def test_copies_to_a_device_other_than_cuda_are_blocking(runner_on_gpu: Runner) -> None:
    """There a non-blocking copy may read memory that is freed, or ids that have not arrived."""
    runner_on_gpu.cuda = False
    with Watch() as watch:
        sequence = put(runner_on_gpu, 30)
        runner_on_gpu.prefill([Chunk(sequence, 0, 30)])
    assert watch.copies == [False, False]


class Copies(TorchDispatchMode):
    """Records whether each copy is non-blocking."""

    def __init__(self) -> None:
        super().__init__()
        self.non_blocking: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name == "aten::copy_":
            self.non_blocking.append((kwargs or {}).get("non_blocking", False) or True in args[2:])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("cuda", [False, True])
def test_the_copy_of_ids_is_non_blocking_only_from_cuda(monkeypatch: pytest.MonkeyPatch, cuda: bool) -> None:
    event = SimpleNamespace(record=lambda: None, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory=False, **options: empty(*shape, **options))
    pending = runner.PendingIds(2, torch.device("cuda" if cuda else "cpu"))
    with Copies() as copies:
        pending.copy(torch.tensor([5, 6]))
    assert copies.non_blocking == [cuda]
    assert pending.read() == [5, 6]


def test_compaction_moves_rows_only_where_a_decode_step_then_computes_fewer(
    runner_on_gpu: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    moves: list[tuple[int, int]] = []
    monkeypatch.setattr(runner_on_gpu, "_move", lambda sequence, target: moves.append((sequence.place, target)))
    for _ in range(4):
        put(runner_on_gpu, 9)
    # a step over seven, six or five rows is padded to eight
    for number in (0, 2, 4):
        runner_on_gpu.release(runner_on_gpu.rows[number])
        runner_on_gpu._compact()
        assert moves == []
    runner_on_gpu.release(runner_on_gpu.rows[1])
    runner_on_gpu._compact()
    assert moves == [(5, 0), (6, 1), (7, 2)]


def test_a_watch_records_what_would_wait(runner_on_gpu: Runner) -> None:
    with Watch() as watch:
        runner_on_gpu.positions[2] = 7
        torch.tensor([1, 2], device=META)
        torch.tensor([1, 2]).to(META)
    assert watch.forbidden == ["setitem", "tensor"] and watch.copies == [False]
    with pytest.raises((RuntimeError, NotImplementedError)), Watch() as watch:
        runner_on_gpu.positions.max().item()


def test_graphs_share_one_stream_and_a_failed_capture_leaves_none_current(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuBLAS keeps a workspace for each stream. One graph of the pool stays: torch could not capture into it again."""
    streams: list[object] = []
    current = ["default"]
    fails = [False]

    class Stream:
        def __init__(self) -> None:
            streams.append(self)

        def wait_stream(self, other: object) -> None: ...

    class Default(Stream):
        def __init__(self) -> None: ...

    default = Default()

    @contextmanager
    def graph(_: object, pool: object, stream: object) -> Iterator[None]:
        assert pool == "pool" and stream is streams[0]
        current[0] = "capturing"
        yield
        if fails[0]:
            raise RuntimeError("operation failed due to a previous error during capture")
        current[0] = "default"

    @contextmanager
    def stream(chosen: object) -> Iterator[None]:
        assert chosen is streams[0]
        yield

    cuda = torch.cuda
    monkeypatch.setattr(cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(cuda, "Stream", Stream)
    monkeypatch.setattr(cuda, "stream", stream)
    monkeypatch.setattr(cuda, "graph", graph)
    monkeypatch.setattr(cuda, "current_stream", lambda: default)
    monkeypatch.setattr(
        cuda, "set_stream", lambda chosen: current.__setitem__(0, "default" if chosen is default else "?")
    )
    graphs: WeakSet[Any] = WeakSet()

    class Graph:
        def __init__(self) -> None:
            graphs.add(self)

        def replay(self) -> None: ...

    monkeypatch.setattr(cuda, "CUDAGraph", Graph)
    capture = gpu.cuda_capture()
    for _ in range(5):
        capture(lambda: None)
        gc.collect()
        assert len(graphs) == 1
    fails[0] = True
    with pytest.raises(RuntimeError, match="previous error"):
        capture(lambda: None)
    assert len(streams) == 1 and current == ["default"]


# memory


class Peak(TorchDispatchMode):
    """Records the most bytes that new tensors hold at once."""

    def __init__(self, before: Runner) -> None:
        super().__init__()
        existing = [*before.model.network.state_dict().values(), before.history, before.logits, before.positions]
        existing += [tensor for layer in before.slots.slot_layers for tensor in (layer.keys, layer.values)]
        self._before = {tensor.untyped_storage()._cdata for tensor in existing}
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.device == META:
                storage = leaf.untyped_storage()
                if storage._cdata not in self._before:
                    self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._live = {key: (ref, size) for key, (ref, size) in self._live.items() if not ref.expired()}
        self.bytes = max(self.bytes, sum(size for _, size in self._live.values()))
        return result


def fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    """The output of a fused kernel; on meta tensors torch would allocate all scores."""
    return query.new_empty(*query.shape[:-1], value.shape[-1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["falcon", "llama"])
@pytest.mark.parametrize("lengths", [(2047, 2047), (2040,), (1000, 1000, 1000, 1000), (128,) * 32])
def test_the_largest_passes_stay_within_their_reserve(
    monkeypatch: pytest.MonkeyPatch, kind: str, lengths: tuple[int, ...]
) -> None:
    """At falcon-rw-1b's size: prompts that fill a chunk, then a decode step of 32 whole contexts."""
    monkeypatch.setattr(runner, "PendingIds", Unread)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fused)
    model = model_of(network(kind, layers=24, width=2048, heads=32))
    reserve = gpu.reserve(model.network, model_module.GPU_PREFILL_CHUNK, 32, CONTEXT, fused=True)
    with torch.inference_mode():
        large = Runner(model, 32, capture=lambda step: step)
        warm_up = put(large, 9)
        large.prefill([Chunk(warm_up, 0, 9)])
        large.release(warm_up)
        chunks = [Chunk(put(large, length, Sampling()), 0, length) for length in lengths]
        assert large.shape.fits(chunks, model_module.GPU_PREFILL_CHUNK)
        with Peak(large) as peak:
            large.prefill(chunks)
        assert reserve.prefill / 10 < peak.bytes < reserve.prefill
        with Peak(large) as peak:
            large._forward(32, CONTEXT)
            large._choose(32, [checkpoints.TOKENS])
        assert peak.bytes < reserve.graphs


@pytest.mark.parametrize(
    ("total", "capability", "chunk", "rows", "spare"),
    [
        # a T4: float16, and 1,024 tokens a pass
        (15.6e9, (7, 5), 1024, 25, 1),
        # an L4
        (23.6e9, (8, 9), 4096, 32, 13),
        # an A100 that another program nearly fills
        (6.2e9, (8, 0), 4096, 4, 0),
    ],
)
def test_the_cache_of_falcon_leaves_a_gpu_the_reserve(
    monkeypatch: pytest.MonkeyPatch,
    total: float,
    capability: tuple[int, int],
    chunk: int,
    rows: int,
    spare: int,
) -> None:
    device = torch.device("cuda", 0)
    falcon = network("falcon", layers=24, width=2048, heads=32)
    token = 24 * 2 * 2048 * 2
    model = model_of(falcon, device=device, token_bytes=token)
    weights = sum(p.numel() for p in falcon.parameters()) * 2
    free = int(total - weights - 400e6)  # CUDA itself takes 400 MB of a GPU
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, int(total)))
    assert model.prefill_chunk() == chunk
    lines: list[str] = []
    assert model.room(32, chunk, lines.append) == Room(rows, CONTEXT, spare * CONTEXT)
    reserve = gpu.reserve(falcon, chunk, 32, CONTEXT, fused=capability >= (8, 0))
    assert (rows + spare) * CONTEXT * token + reserve.total < free
    for part in (reserve.prefill, reserve.graphs, reserve.workspaces):
        assert f"{part / 1e6:.0f} MB" in "\n".join(lines)


def test_the_reserve_is_the_sum_of_its_parts() -> None:
    """For 4,096 tokens a pass and 32 contexts of 2,048 of falcon-rw-1b in bfloat16, computed by hand."""
    reserve = gpu.reserve(network("falcon", layers=1, width=2048, heads=32), 4096, 32, CONTEXT, fused=True)
    # 6 x 2,048 and 3 x 8,192 numbers of two bytes
    activations = 73_728
    # ALiBi's bias, of each position for each head
    scores = 131_072
    # 11 tensors of 32 x 50,304 float32
    sampling = 70_828_032
    assert reserve.prefill == 4096 * (activations + scores) + sampling == 909_688_832
    # 42 copies of 4 MiB; a step; its choice; a history of int64 and the logits in float32
    assert reserve.graphs == 176_160_768 + 32 * (activations + scores) + sampling + 32 * (16_384 + 201_216)
    assert reserve.workspaces == 134_217_728
    assert reserve.total == 1_304_412_160


def test_the_reserve_counts_scores_that_no_kernel_fuses() -> None:
    """As on a T4 with grouped queries, and in transformers' eager attention."""
    llama = network("llama", layers=24, width=2048, heads=32)
    reserve = gpu.reserve(llama, 1024, 32, CONTEXT, fused=True).prefill
    scores = 1024 * CONTEXT * 32 * 4
    assert gpu.reserve(llama, 1024, 32, CONTEXT, fused=False).prefill > reserve + 2 * scores
    llama.set_attn_implementation("eager")
    assert gpu.reserve(llama, 1024, 32, CONTEXT, fused=True).prefill > reserve + 2 * scores


def test_cudnns_attention_which_plans_for_each_shape_is_off() -> None:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        gpu.avoid_cudnn_attention()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.mem_efficient_sdp_enabled() and torch.backends.cuda.flash_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
