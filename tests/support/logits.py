"""The error of our bfloat16 logits against transformers' float32 ones, over that of transformers' bfloat16 ones.

Needs the image's packages alone: `python tests/support/logits.py FOLDER` runs in the image's environment.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from llm.devices import linear
from llm.devices.model import Model
from llm.engine.runner import Runner
from llm.engine.scheduler import Chunk
from llm.engine.sequence import Request, Sampling, Sequence

CASES = tuple((length, rows, packed) for length, rows in [(150, 8), (1200, 1)] for packed in (False, True))
"""Tokens of the text, rows, whether the model is packed."""
MOST = 2
"""Not 1: decode steps round elsewhere than one pass over the text. A wrong ALiBi gives 5."""

STEPS = 40
GREEDY = Sampling(temperature=0)


def reference(folder: Path, text: torch.Tensor, vocabulary: int, dtype: torch.dtype) -> torch.Tensor:
    """transformers' logits after each of the last STEPS + 1 ids of the text: (STEPS + 1, vocabulary) float32."""
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.inference_mode():
        logits: torch.Tensor = network(text[None], logits_to_keep=STEPS + 1).logits[0, :, :vocabulary].float()
    return logits


def walked(model: Model, text: torch.Tensor, rows: int) -> torch.Tensor:
    """Our logits at the same positions, decoding along the text in each row: (rows, STEPS + 1, vocabulary) float32.

    Row r has a prompt r tokens shorter and stays r steps behind; the positions that it does not reach are NaN.
    """
    runner = Runner(model, rows)
    prompt = len(text) - STEPS
    logits = torch.full((rows, STEPS + 1, model.vocabulary), torch.nan)
    with torch.inference_mode():
        sequences = [Sequence(Request(text[: prompt - row].tolist(), STEPS, GREEDY), STEPS) for row in range(rows)]
        for sequence in sequences:
            runner.put(sequence)
        runner.prefill([Chunk(sequence, 0, len(sequence.prompt)) for sequence in sequences])
        for step in range(STEPS):
            for row in range(rows):
                at = prompt - row + step
                runner.history[row, at] = text[at]
            runner.decode()
            for row in range(min(rows, step + 2)):
                logits[row, step + 1 - row] = runner.logits[row]
    return logits


def distance(folder: Path, length: int, rows: int, packed: bool) -> float:
    """The largest error of a row, in units of transformers' bfloat16 error: root mean squares."""
    model = Model.read(folder, torch.bfloat16, layout=linear.BFloat16Linear if packed else None)
    text = torch.randint(0, model.vocabulary, (length,), generator=torch.Generator().manual_seed(1))
    exact = reference(folder, text, model.vocabulary, torch.float32)
    rounding = reference(folder, text, model.vocabulary, torch.bfloat16) - exact
    errors = walked(model, text, rows) - exact
    reached = ~errors[:, :, 0].isnan()
    assert reached.sum(1).min() >= STEPS - rows
    return max(_rms(row[at]) for row, at in zip(errors, reached, strict=True)) / _rms(rounding)


def _rms(difference: torch.Tensor) -> float:
    return difference.square().mean().sqrt().item()


if __name__ == "__main__":
    cases = [case for case in CASES if linear.BFloat16Linear.is_fast() or not case[-1]]
    distances = [distance(Path(sys.argv[1]), *case) for case in cases]
    print(json.dumps({"torch": torch.__version__, "distances": distances}))
