"""What script/bench compares, each in a process of its own: our engine, and transformers' generate as it is by default.

Prints a line of JSON for each turn. Knows ids and seconds, nothing of rounds.
"""

import json
import os
import platform
import random
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from itertools import cycle, islice
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from llm.devices import gpu
from llm.devices.model import Model, best_dtype
from llm.engine.engine import Engine
from llm.engine.scheduler import MOST_ROWS
from llm.engine.sequence import Request, Sampling
from llm.errors import UserError
from llm.weights import hub
from llm.weights.settings import Settings

Generate = Callable[[list[list[int]], int], int]
"""Continues each prompt's ids by a number of tokens, past stop tokens too. Returns how many tokens were generated."""


def our_engine(settings: Settings) -> tuple[Generate, dict[str, Any]]:
    """llm.engine, with as many rows as in the server; all requests at once."""
    model = Model.load(hub.ensure(settings, print), settings, print)
    # so that every request ends by its length
    model.stop_ids = frozenset()
    # before the cache takes the memory
    copied = copied_bytes_per_second(model.device) if model.device.type == "cuda" else None
    engine = Engine(model, MOST_ROWS, say=print)
    engine.start()

    def generate(prompts: list[list[int]], tokens: int) -> int:
        generations = [engine.generate(Request(prompt, tokens, Sampling(temperature=0))) for prompt in prompts]
        return sum(len(tokens) for generation in generations for tokens in generation)

    return generate, {
        "dtype": model.precision,
        "device": str(model.device),
        "context": engine.context,
        "rows": engine.most_rows,
        "setup": engine.seconds,
        "step_bytes": sum(m.weight.nbytes for m in model.network.modules() if isinstance(m, torch.nn.Linear)),
        "copied_bytes_per_second": copied,
    }


def copied_bytes_per_second(device: torch.device) -> float:
    """What a GPU's memory gives while it copies: bytes read and bytes written; the best of some turns."""
    source, target = torch.empty(2, 1 << 28, dtype=torch.uint8, device=device)
    moved: int = 2 * source.nbytes
    return moved / min(gpu.seconds(lambda: target.copy_(source), 10))


def plain_generate(settings: Settings) -> tuple[Generate, dict[str, Any]]:
    """transformers' model.generate with its defaults, the weights unpacked; one request after another."""
    dtype = getattr(torch, settings.dtype) if settings.dtype else best_dtype()
    network: Any = AutoModelForCausalLM.from_pretrained(
        settings.folder, dtype=dtype, device_map="auto", trust_remote_code=False, local_files_only=True
    )
    network.generation_config.eos_token_id = None

    def generate(prompts: list[list[int]], tokens: int) -> int:
        made = 0
        for prompt in prompts:
            ids = torch.tensor([prompt], device=network.device)
            text = network.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, max_new_tokens=tokens
            )
            # tolist() waits for a GPU, which may still be computing
            made += len(text[0].tolist()) - len(prompt)
        return made

    return generate, {}


@contextmanager
def busy_core() -> Iterator[None]:
    """Keep one core busy with another process. It ends with the block, or with this process if that is killed."""
    program = f"import os\nwhile os.getppid() == {os.getpid()}: pass"
    with subprocess.Popen([sys.executable, "-c", program]) as process:
        try:
            yield
        finally:
            process.kill()


def contend(name: str, turns: list[tuple[int, bool]], lengths: list[int], tokens: int) -> Iterator[dict[str, Any]]:
    """Yield the figures of each turn: (requests at once, whether another process is busy). Raises UserError."""
    generate, facts = {"engine": our_engine, "generate": plain_generate}[name](Settings.read())
    if max(lengths) + tokens > facts.get("context", sys.maxsize):
        raise UserError(f"--tokens {tokens} no cabe: el modelo admite {facts['context']} en total, pida menos")
    # any vocabulary has these ids, and the speed does not depend on what they say
    ids = random.Random(1)
    most = max(requests for requests, _ in turns)
    prompts = [ids.choices(range(256), k=length) for length in islice(cycle(lengths), most)]
    gpus = range(torch.cuda.device_count())
    facts |= {
        "versions": {
            "python": platform.python_version(),
            # the metadata of the package registry's CUDA build has no +cu130
            "torch": torch.__version__,
            **{package: version(package) for package in ("transformers", "cog")},
        },
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(gpu) for gpu in gpus],
    }

    def run(requests: int, tokens: int) -> tuple[int, float]:
        start = time.perf_counter()
        return generate(prompts[:requests], tokens), time.perf_counter() - start

    for requests, busy in turns:
        run(requests, 4)
        with busy_core() if busy else nullcontext():
            first, whole = run(requests, 1), run(requests, tokens)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        used = sum(torch.cuda.max_memory_allocated(gpu) for gpu in gpus) if gpus else None
        yield facts | {"requests": requests, "first": first, "whole": whole, "peak_bytes": peak, "gpu_bytes": used}


def main() -> None:
    def end_with_parent() -> None:
        os.read(0, 1)
        os._exit(0)

    threading.Thread(target=end_with_parent, daemon=True).start()
    # stdout is for the turns alone
    output, sys.stdout = sys.stdout, sys.stderr
    try:
        for turn in contend(**json.loads(sys.argv[1])):
            print(json.dumps(turn), file=output, flush=True)
    except UserError as error:
        print(json.dumps({"error": str(error)}), file=output, flush=True)


if __name__ == "__main__":
    main()
