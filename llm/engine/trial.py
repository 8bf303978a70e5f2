"""A model is tried before it serves: the engine's own passes against the model's plain forward, on random prompts.

Some architectures compute something else in a pass of several rows: attention that counts from the cache's length, a
rotary embedding that the longest row decides, positions that the forward does not take. Their text is fluent and wrong.

Two right passes differ by rounding alone. How far rounding moves the logits depends on the model and its dtype, so the
trial measures that: the plain forward computes one row twice, the second time with each module's output rounded anew.
"""

import gc
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from statistics import median_low
from typing import Any

import torch
from torch import Tensor, nn

from llm.devices import llama
from llm.devices.memory import empty_cuda_cache, is_out_of_memory
from llm.devices.model import MAY_CHANGE, Model
from llm.engine.runner import Runner
from llm.engine.scheduler import Chunk
from llm.engine.sequence import Request, Sampling, Sequence
from llm.errors import UserError
from llm.words import Say, first_line

SHORT, LONG = 6, 16
"""Tokens of the two prompts, where the context and the boundaries leave room."""
DECODED = 2
"""Decode steps of both rows, and then as many of the short one alone."""
SPARE = 64
"""Positions that the cache has beyond the longest row."""

FEWEST_LAYERS = 2
"""Layers that are tried, and more where the first of some kind comes later: the others compute in the same way."""

BOUNDARIES = {"attention_chunk_size", "original_max_position_embeddings", "sliding_window", "window_size"}
"""Names in a configuration of the number of tokens after which a model computes in another way."""
CPU_WORK = 4e10
GPU_WORK = 7e13
"""The most multiplications of one pass over a prompt past a boundary: an estimate of a second or two in all."""

ROUNDINGS = 3
"""The error allowed, in errors of one rounding of each module's output: the passes round within modules too."""
LEAST_ERROR = 1e-3
"""The error allowed in any case, in standard deviations of the logits."""


def runner_class(model: Model) -> type[Runner]:
    """What computes this model's passes."""
    if model.ragged:
        from llm.engine.ragged import RaggedRunner  # imports Triton, which a computer without a GPU may lack

        return RaggedRunner
    return Runner


def _recording(model: Model, rows: int) -> Any:
    """A runner of the model that keeps the logits of its last pass as `last`, (rows, vocabulary) float32."""

    class Recording(runner_class(model)):  # type: ignore[misc]
        def _logits(self, *args: Any, **kwargs: Any) -> Tensor:
            logits: Tensor = super()._logits(*args, **kwargs)
            self.last = logits
            return logits

    return Recording(model, rows)


def agreeing(model: Model, say: Say) -> Model:
    """The model with the longest context in which the engine's passes agree with the model's forward, and without
    ragged passes, or passes of chunks that start at different positions, where those do not agree. On a GPU it is
    batch-invariant only where these passes are.

    Says so where the context is shorter. Raises UserError where there is none. Computes on the thread that calls: see
    Model.load.
    """
    name, context = type(model.network).__name__, model.context
    boundaries = sorted(set(_boundaries(model.network.config.get_text_config().to_dict(), context)))
    try:
        with torch.inference_mode(), _first_layers(model):
            long = min(LONG, *(most - DECODED - 1 for most in (context, *boundaries)))
            wanted = model.ragged and model.batch_invariant
            model = _simplified(model, long, say)
            if wanted and not (model.ragged and _keeps_bits(model, long)):
                say(MAY_CHANGE)
                model = replace(model, batch_invariant=False)
            for boundary in boundaries:
                reason = _reason_to_end_at(model, boundary)
                if reason:
                    say(f"El contexto acaba en {boundary} tokens y no en {context}: más allá, {name} {reason}")
                    return replace(model, context=boundary)
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"{name} no sabe atender varias preguntas a la vez ({first_line(error)}): use otro modelo "
            "(Falcon, Llama...)"
        ) from error
    finally:
        if model.device.type == "cuda":
            gc.collect()  # a cache and its layers refer to each other
            empty_cuda_cache()
    return model


def _simplified(model: Model, long: int, say: Say) -> Model:
    """The model without what keeps its passes from agreeing with its forward. Raises UserError, or what the model
    raises, where they do not agree in the simplest way."""
    name = type(model.network).__name__

    def without_ragged(reason: str) -> Model:
        say(f"{name} va sin kernels propios de atención: {reason}")
        return model.without_ragged()

    def with_transformers_layers(reason: str) -> Model:
        say(f"{name} va con las operaciones de transformers, más despacio: {reason}")
        llama.restore(model.network)
        return model

    def with_one_start(_: str) -> Model:
        return replace(model, mixes_starts=False)

    ways = [
        (without_ragged, model.ragged),
        (with_transformers_layers, llama.is_replaced(model.network)),
        (with_one_start, model.mixes_starts),
    ]
    for simpler in (way for way, is_left in ways if is_left):
        reason = _reason_against(model, long)
        if reason is None:
            return model
        model = simpler(reason)
    if not _agree(model, long):
        raise UserError(
            f"{name} calcula otro texto cuando atiende varias preguntas a la vez: use otro modelo (Falcon, Llama...)"
        )
    return model


def _reason_against(model: Model, long: int) -> str | None:
    """Why the model is not served as it is now, in Spanish; None where its passes agree with its forward."""
    try:
        return None if _agree(model, long) else "si no, calcula otro texto"
    except Exception as error:  # a model may do anything with a pass that is no rectangle
        if is_out_of_memory(error):
            raise
        return first_line(error)


def _reason_to_end_at(model: Model, boundary: int) -> str | None:
    """Why the context ends at a boundary, in Spanish; None where the passes agree past it."""
    past = boundary + SHORT
    most_work = GPU_WORK if model.device.type == "cuda" else CPU_WORK
    attention = 2 * past * model.network.config.get_text_config().hidden_size * model.layers
    work = past * (model.parameters + attention)
    if past + DECODED >= model.context or work > most_work:
        return "no se puede comprobar al cargar"
    return None if _agree(model, past) else "calcula otro texto cuando atiende varias preguntas a la vez"


@contextmanager
def _first_layers(model: Model) -> Iterator[None]:
    """Take the other layers out of the network meanwhile: on a slow CPU all of Falcon's would take some 10 seconds."""
    kinds = getattr(model.network.config.get_text_config(), "layer_types", None) or []
    number = max([FEWEST_LAYERS, *(1 + kinds.index(kind) for kind in kinds)])
    lists = (module for module in model.network.modules() if isinstance(module, nn.ModuleList))
    layers = next((layers for layers in lists if len(layers) == model.layers), nn.ModuleList())
    others = layers[number:]
    del layers[number:]
    try:
        yield
    finally:
        layers.extend(others)


def _boundaries(config: dict[str, Any], context: int) -> Iterator[int]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _boundaries(value, context)
        elif name in BOUNDARIES and isinstance(value, int) and SHORT <= value < context:
            yield value


def _agree(model: Model, long: int) -> bool:
    """Whether the logits agree for a short prompt and one of `long` tokens: read in one pass with padding, the long one
    in two chunks, beside the second one the short prompt again where passes mix starts; decoded together, with spare
    capacity; the short one decoded alone."""
    runner = _recording(replace(model, context=min(model.context, long + DECODED + SPARE)), rows=3)
    short, half = min(SHORT, long // 2), long // 2
    requests = [Request(prompt, 1, Sampling(temperature=0)) for prompt in _prompts(model, short, long)]
    a, b, again = (Sequence(request, budget=1) for request in (*requests, requests[0]))
    logits: dict[Sequence, list[Tensor]] = {a: [], b: [], again: []}
    left = runner.shape.left_to_decode

    def prefill(*chunks: Chunk) -> None:
        runner.prefill([*chunks])
        for index, chunk in enumerate(chunks):
            if chunk.is_last and not left:
                logits[chunk.sequence].append(runner.last[index])

    def decode() -> None:
        runner.decode()
        for number, sequence in runner.rows.items():
            logits[sequence].append(runner.last[number])

    for sequence in (a, b):
        runner.put(sequence)
    prefill(Chunk(a, 0, a.prefill_end), Chunk(b, 0, half))
    rest = [Chunk(b, half, b.prefill_end - half)]
    if runner.shape.mixes_starts:
        runner.put(again)
        rest.append(Chunk(again, 0, again.prefill_end))
    prefill(*rest)
    for _ in range(left):
        decode()
    runner.release(again)
    for _ in range(DECODED):
        decode()
    long_ids = runner.history[b.place, : b.cached].clone()
    runner.release(b)
    for _ in range(DECODED):
        decode()
    short_ids = runner.history[a.place, : a.cached]
    together = 1 + DECODED
    with _rounded_anew(model.network):
        plain, rounded = _plain(runner, short_ids.expand(2, -1), together + DECODED)
    (plain_long,) = _plain(runner, long_ids[None], together)
    allowed = max(LEAST_ERROR, ROUNDINGS * median_low(_errors(rounded, plain)))
    errors, long_errors = _errors(torch.stack(logits[a]), plain), _errors(torch.stack(logits[b]), plain_long)
    tried = [errors[:together], errors[together:], long_errors]
    if logits[again]:
        tried.append(_errors(torch.stack(logits[again]), plain[:1]))
    # the median: where a mixture of experts has a tie, rounding alone sends a token to another expert
    return all(median_low(some) <= allowed for some in tried)


def _keeps_bits(model: Model, long: int) -> bool:
    """Whether the logits after a prompt have the same bits where it is read at once, alone, and where it is read in two
    chunks beside another one. This shows what a layer computes that no kernel replaced."""
    model = replace(model, context=min(model.context, long + DECODED + SPARE))
    prompt, another = _prompts(model, long, SHORT)

    def logits(*prompts: list[int]) -> Tensor:
        """After the last of these prompts, (steps, vocabulary)."""
        runner = runner_class(model)(model, rows=2)
        *others, ours = (Sequence(Request(each, 1, Sampling(temperature=0)), budget=1) for each in prompts)
        for sequence in (*others, ours):
            runner.put(sequence)
        cut = ours.prefill_end // 2 if others else ours.prefill_end
        runner.prefill([Chunk(ours, 0, cut), *(Chunk(other, 0, other.prefill_end) for other in others)])
        if others:
            runner.prefill([Chunk(ours, cut, ours.prefill_end - cut)])
        steps = []
        for _ in range(1 + DECODED):
            runner.decode()
            steps.append(runner.logits[ours.place].clone())
        return torch.stack(steps)

    return torch.equal(logits(prompt), logits(another, prompt))


def _prompts(model: Model, *lengths: int) -> Iterator[list[int]]:
    """Random ids of ordinary tokens."""
    control = {*model.tokenizer.all_special_ids, *model.tokenizer.added_tokens_decoder}
    ordinary = [id for id in range(model.vocabulary) if id not in control]
    rng = random.Random(0)
    return (rng.choices(ordinary, k=length) for length in lengths)


def _plain(runner: Runner, ids: Tensor, last: int) -> Tensor:
    """The logits of the model's forward over whole sequences, without a cache. ids (rows, tokens) int64. Returns those
    of the last tokens, (rows, last, vocabulary) float32."""
    model = runner.model
    positions = torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)
    extra = {"position_ids": positions} if runner.takes_positions else {}
    logits: Tensor = model.network(input_ids=ids, use_cache=False, logits_to_keep=last, **extra).logits
    return logits[:, -last:, : model.vocabulary].float().to(ids.device)


@contextmanager
def _rounded_anew(network: nn.Module) -> Iterator[None]:
    """In a pass of two rows, multiply the second row of each module's output by 1 plus at most half an epsilon."""
    generator = torch.Generator().manual_seed(0)

    def hook(module: nn.Module, inputs: object, output: object) -> Tensor | None:
        if not (isinstance(output, Tensor) and output.is_floating_point() and len(output) == 2):
            return None
        noise = torch.rand(output[1].shape, generator=generator).to(output.device) - 0.5
        second = output[1] * (1 + noise * torch.finfo(output.dtype).eps)
        return torch.stack([output[0], second.to(output.dtype)])

    leaves = [module for module in network.modules() if next(module.children(), None) is None]
    handles = [module.register_forward_hook(hook) for module in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _errors(logits: Tensor, expected: Tensor) -> list[float]:
    """Of each row of (rows, vocabulary), in standard deviations of what is expected. An expected row that is not finite
    has error 0; for logits that are not, infinity."""
    # the engine pads the logits of a model that has them for fewer ids than it reads
    logits = logits[:, : expected.shape[-1]]
    spread = expected.std(-1)
    errors = (logits - expected).std(-1) / spread.clamp(min=torch.finfo(torch.float32).tiny)
    return errors.nan_to_num(torch.inf).where(spread.isfinite(), 0).tolist()
