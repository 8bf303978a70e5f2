"""Who is measured in turn, each in a process of its own: our engine, and transformers' generate as it comes.

Both ends of the pipe between them and the command, a line of JSON each way. Knows ids and seconds, nothing of rounds.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import IO, Any, Literal

from cli.server import WAITING
from llm.errors import UserError
from llm.settings import ROOT, Settings

Name = Literal["engine", "generate"]
_SPANISH: dict[Name, str] = {"engine": "del motor", "generate": "de generate"}


@dataclass(frozen=True)
class Run:
    """What a contender did when told to: new tokens in all, and seconds."""

    tokens: int
    seconds: float


class Contender:
    """A process that has its model loaded, and computes only when told."""

    def __init__(self, name: Name, process: subprocess.Popen[str], log: IO[str]) -> None:
        self._name = name
        self._process = process
        self._log = log
        self.facts = self._reply()
        """Its dtype, device, threads and so on."""
        self.gpu_bytes: int | None = None
        """The most of the GPUs' memory that it has used so far."""

    @property
    def pid(self) -> int:
        return self._process.pid

    def generate(self, prompts: list[list[int]], tokens: int) -> Run:
        """Continue each of these ids by so many tokens, whatever they are. Raises UserError."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended: _reply says of what
            self._process.stdin.write(json.dumps({"prompts": prompts, "tokens": tokens}) + "\n")
            self._process.stdin.flush()
        reply = self._reply()
        self.gpu_bytes = reply["gpu_bytes"]
        return Run(reply["tokens"], reply["seconds"])

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            said = [text for text in self._log.read().splitlines() if text.strip()]
            raise UserError(
                f"El proceso {_SPANISH[self._name]} se cerró, casi siempre por falta de memoria: cierre otros "
                "programas o pruebe el modelo de muestra con --demo. "
                f"Lo último que dijo: {said[-1] if said else 'nada'}"
            )
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise UserError(reply["error"])
        return reply


@contextmanager
def contending(name: Name, environment: Mapping[str, str]) -> Iterator[Contender]:
    """Start a contender and wait for its model; end it on the way out. `environment` goes over this process's own."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "cli.contenders", name],
            cwd=ROOT,
            # generate as it comes
            env={**(WAITING if name == "engine" else {}), **os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            # a Ctrl-C reaches the command alone, which ends this one
            start_new_session=True,
            encoding="utf-8",
        )
        with process:
            try:
                yield Contender(name, process, log)
            finally:
                process.kill()


# The process's own end. The command does without torch, so it is imported here.


class OurEngine:
    """llm.engine, with as many rows as the server's."""

    def __init__(self, settings: Settings, most_rows: int = 32) -> None:
        from llm.engine import Engine
        from llm.model import Model

        model = Model.load(settings)
        # every request then ends by its length
        model.stop_ids = frozenset()
        self.engine = Engine(model, most_rows)
        self.engine.start()
        self.facts = {
            "dtype": str(model.network.dtype).removeprefix("torch."),
            "device": str(model.device),
            "vocabulary": model.vocabulary,
            "context": self.engine.context,
            "rows": self.engine.most_rows,
        }

    def generate(self, prompts: list[list[int]], tokens: int) -> int:
        """All at once. Returns how many tokens that made."""
        from llm.engine import Request
        from llm.sampling import Sampling

        greedy = Sampling(temperature=0)
        generations = [self.engine.generate(Request(prompt, tokens, greedy)) for prompt in prompts]
        return sum(len(list(generation)) for generation in generations)


class Generate:
    """transformers' model.generate with its defaults, the weights unpacked."""

    def __init__(self, settings: Settings) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from llm.model import best_dtype

        dtype = getattr(torch, settings.dtype) if settings.dtype else best_dtype()
        self.network: Any = AutoModelForCausalLM.from_pretrained(
            settings.folder, dtype=dtype, device_map="auto", trust_remote_code=False, local_files_only=True
        )
        self.network.generation_config.eos_token_id = None
        self.facts: dict[str, Any] = {}

    def generate(self, prompts: list[list[int]], tokens: int) -> int:
        """One after another. Returns how many tokens that made."""
        import torch

        made = 0
        for prompt in prompts:
            ids = torch.tensor([prompt], device=self.network.device)
            text = self.network.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, max_new_tokens=tokens
            )
            # to the host: a GPU may still be computing
            made += len(text[0].tolist()) - len(prompt)
        return made


def contend(name: str) -> None:
    """Load, say so, and do what each line of stdin tells. When that ends, so does the process, whatever it is doing."""
    orders: SimpleQueue[str] = SimpleQueue()

    def listen() -> None:
        for line in sys.stdin:
            orders.put(line)
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    replies = sys.stdout
    # what the model prints is no reply
    sys.stdout = sys.stderr

    def reply(content: dict[str, Any]) -> None:
        print(json.dumps(content), file=replies, flush=True)

    try:
        contender = OurEngine(Settings.read()) if name == "engine" else Generate(Settings.read())

        import torch

        gpus = range(torch.cuda.device_count())
        reply(
            {
                **contender.facts,
                "threads": torch.get_num_threads(),
                "gpus": [torch.cuda.get_device_name(gpu) for gpu in gpus],
            }
        )
        while True:
            order = json.loads(orders.get())
            start = time.perf_counter()
            tokens = contender.generate(order["prompts"], order["tokens"])
            seconds = time.perf_counter() - start
            used = sum(torch.cuda.max_memory_allocated(gpu) for gpu in gpus) if gpus else None
            reply({"tokens": tokens, "seconds": seconds, "gpu_bytes": used})
    except UserError as error:
        reply({"error": str(error)})


if __name__ == "__main__":
    contend(sys.argv[1])
