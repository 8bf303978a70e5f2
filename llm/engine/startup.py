"""Getting ready: the context and the rows that the memory holds, the first tokens, the prefix, the graphs."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

from llm.devices.memory import is_out_of_memory
from llm.devices.model import MAY_CHANGE, Model, Room
from llm.engine import trial
from llm.engine.runner import Runner
from llm.engine.scheduler import Chunk
from llm.engine.sequence import Request, Sampling, Sequence
from llm.errors import UserError
from llm.words import Say, decimal, first_line


@contextmanager
def memory() -> Iterator[None]:
    """Turn a lack of memory while the engine gets ready into one line, a UserError."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError("Falta memoria para empezar: cierre otros programas, o ponga MAX_CONTEXT más bajo") from error


def fit(model: Model, most_rows: int, chunk: int, say: Say) -> tuple[Model, Room]:
    """The model with the context that it serves, and what the memory holds, `most_rows` at the most.

    chunk: the tokens that a pass of prompts computes. Raises UserError where the model computes something else in
    passes of several rows, or the memory is too small for one row.
    """
    # on a thread that ends: see Model.load
    with memory(), ThreadPoolExecutor(1) as thread:
        model = thread.submit(trial.agreeing, model, say).result()
    room = model.room(most_rows, chunk, say)
    return replace(model, context=room.context), room


def warm_up(runner: Runner, prefix: list[int], chunk: int, say: Say) -> dict[str, float]:
    """Compute the first tokens, read the prefix that many prompts begin with, and capture graphs where the device has
    them. Returns the seconds of `warm_up` and, with graphs, of `capture`."""
    start = time.perf_counter()
    sequence = Sequence(Request([0, 0], 3, Sampling(temperature=1, top_k=50)), budget=3)
    runner.put(sequence)
    runner.prefill([Chunk(sequence, 0, sequence.prefill_end)])
    for _ in range(2):
        runner.decode().read()
    runner.release(sequence)
    model, rows = runner.model, runner.slots.rows
    if 0 < len(prefix) < model.context:
        _read_template(runner, prefix, chunk)
    if runner.threads:
        runner.threads.ask(model.bits_agree)
    seconds = {"warm_up": time.perf_counter() - start}
    size = (rows * model.context + runner.slots.spare) * sum(model.token_bytes.values())
    say(f"Caché: {rows} peticiones a la vez de {model.context} tokens, hasta {decimal(size / 1e9)} GB")
    say(f"Primeros tokens de prueba en {decimal(seconds['warm_up'])} s")
    start = time.perf_counter()
    if runner.cuda and runner.prove_choosing(say):
        say("El token siguiente lo elige un kernel propio")
    elif runner.cuda and model.batch_invariant:
        say(MAY_CHANGE)
    try:
        if graphs := runner.capture_graphs():
            seconds["capture"] = time.perf_counter() - start
            say(f"{graphs} grafos CUDA capturados en {decimal(seconds['capture'])} s")
    except RuntimeError as error:
        # torch says that the capture failed; why, the error that it met while it ended it
        reason = first_line(error.__context__ or error)
        runner.drop_graphs()
        say(f"Sin grafos CUDA, cada paso va más despacio: este modelo no se deja capturar ({reason})")
    return seconds


def _read_template(runner: Runner, prefix: list[int], chunk: int) -> None:
    """Prefill the prefix in chunks, for the prompts that begin with it."""
    sequence = Sequence(Request(prefix, 1, Sampling()), budget=1)
    runner.put(sequence)
    while left := len(prefix) - sequence.cached:
        runner.prefill([Chunk(sequence, sequence.cached, min(left, chunk))])
    runner.prefixes.add_template(sequence.ids, runner.slots.block(sequence.place, 0, len(prefix)))
    runner.release(sequence)
