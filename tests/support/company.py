"""Whether what a request gets depends on its company: the same random requests one after another, then together.

Needs the image's packages alone: `python tests/support/company.py FOLDER` runs in the image's environment.
"""

import json
import random
import sys
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch

from llm.devices import linear
from llm.devices.model import Model
from llm.engine import engine
from llm.engine import sequence as sequence_module
from llm.engine.engine import Engine
from llm.engine.runner import PendingIds
from llm.engine.scheduler import Chunk
from llm.engine.sequence import Request, Sampling

LENGTHS = (1, 2, 5, 20, 31, 32, 33, 60, 100, 257, 600)
PREFIX = 25
"""Tokens that many requests begin with."""
TEXT = 500
"""Tokens of a text that others begin with, as far as chance has it."""
CONTEXT = 704
"""So short that there is memory for few prefixes: they come and go."""
OTHERS = 1
"""The seed of requests that are nothing but company."""

Checksums = dict[int, list[int]]


def random_requests(model: Model, count: int, most_tokens: int, lengths: Sequence[int]) -> list[Request]:
    """Greedy and drawn, their prompts of such lengths and longer, many of which begin alike; each has a seed of its
    own."""
    rng = random.Random(0)
    prefix = [rng.randrange(model.vocabulary) for _ in range(PREFIX)]
    text = [rng.randrange(model.vocabulary) for _ in range(TEXT)]
    requests = []
    for seed in range(OTHERS + 1, OTHERS + 1 + count):
        prompt = [rng.randrange(model.vocabulary) for _ in range(rng.choice(lengths))]
        sampling = Sampling(
            temperature=rng.choice([0, 0, 0.7, 1.2]),
            top_p=rng.choice([1, 0.95]),
            top_k=rng.choice([0, 1, 5, 50, 50, 300]),
            repetition_penalty=rng.choice([1, 1.1]),
            seed=seed,
        )
        beginning = rng.choice([[], prefix, text[: rng.randrange(TEXT)]])
        prompt = (beginning + prompt)[: model.context - most_tokens]
        requests.append(Request(prompt, rng.randint(1, most_tokens), sampling))
    return requests


def compare(
    model: Model, count: int, most_tokens: int, context: int = CONTEXT, lengths: Sequence[int] = LENGTHS
) -> dict[str, int]:
    """How many of so many requests get the same tokens, and the same logits in every bit, alone and in company.

    In company prompts are cut into smaller chunks too, what they have in common is read once, and threads come and go.
    """
    model = replace(model, context=context)
    requests = random_requests(model, count, most_tokens, lengths)
    alone, expected = _answers(model, requests, workers=1)
    together, found = _answers(model, requests, workers=24, prefix=requests[0].prompt[:PREFIX], chunk=80)
    return {
        "tokens": sum(a == b for a, b in zip(alone, together, strict=True)),
        "logits": sum(expected[request.sampling.seed] == found[request.sampling.seed] for request in requests),
        "requests": count,
    }


def _answers(
    model: Model, requests: list[Request], workers: int, prefix: list[int] | None = None, chunk: int | None = None
) -> tuple[list[list[int]], Checksums]:
    checksums: Checksums = {}

    class Recording(engine.runner_class(model)):  # type: ignore[misc]
        def prefill(self, chunks: list[Chunk]) -> PendingIds | None:
            ids: PendingIds | None = super().prefill(chunks)
            for index, chunk in enumerate(chunks):
                if ids and chunk.is_last:
                    self._record(chunk.sequence, self.seen[index])
            return ids

        def decode(self) -> PendingIds:
            ids: PendingIds = super().decode()
            for sequence in self.rows.values():
                if sequence.prefilled:
                    # what a graph computes too
                    self._record(sequence, self.logits[sequence.place])
            return ids

        def _logits(self, *args: object, **kwargs: object) -> torch.Tensor:
            logits: torch.Tensor = super()._logits(*args, **kwargs)
            self.seen = logits
            return logits

        def _record(self, sequence: sequence_module.Sequence, logits: torch.Tensor) -> None:
            checksum = zlib.crc32(logits.cpu().numpy().tobytes())
            checksums.setdefault(sequence.sampling.seed, []).append(checksum)

        def fit_threads(self) -> None:
            super().fit_threads()
            if workers > 1 and self.threads:
                self.threads.take(numbers.choice([1, self.threads.most]))

    rng, numbers = random.Random(1), random.Random(2)
    with patch.object(engine, "runner_class", lambda model: Recording):
        serving = Engine(model, 16, prefill_chunk=chunk, share_prefixes=workers > 1)
        serving.start(prefix)

    def ask(request: Request, wait: float) -> list[int]:
        time.sleep(wait)
        return [token for tokens in serving.generate(request) for token in tokens]

    def ask_and_cancel(request: Request, tokens: int) -> None:
        generation = serving.generate(request)
        taken = 0
        for came in generation if tokens else ():
            taken += len(came)
            if taken >= tokens:
                break
        generation.cancel()

    # a client that takes each token at once also leaves in the middle
    with patch.object(sequence_module, "CHUNK_EVERY", 0), ThreadPoolExecutor(workers) as threads:
        asked = []
        for request in rng.sample(requests, len(requests)) if workers > 1 else requests:
            asked.append((request, threads.submit(ask, request, rng.random() * 0.02 if workers > 1 else 0)))
            if workers > 1 and rng.random() < 0.2:
                other = Request(request.prompt[::-1], 20, Sampling(seed=OTHERS))
                threads.submit(ask_and_cancel, other, rng.randrange(20))
    answers = {request.sampling.seed: answer.result() for request, answer in asked}
    return [answers[request.sampling.seed] for request in requests], checksums


if __name__ == "__main__":
    layout = linear.layout(chosen=None)
    assert layout
    loaded = Model.read(Path(sys.argv[1]), layout.dtype, layout=layout)
    invariant = {"batch_invariant": int(loaded.batch_invariant)}
    print(json.dumps({"torch": torch.__version__} | invariant | compare(loaded, count=60, most_tokens=20)))
