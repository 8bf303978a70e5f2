"""The Cog interface: what a prediction takes, and the text that it streams. Sees text and numbers, never a tensor."""

import asyncio
import contextvars
import random
import time
import weakref
from collections.abc import Iterator
from typing import Optional

import cog
from cog import AsyncConcatenateIterator, BasePredictor, Input, streaming

from llm.cancellation import follow_cancels, on_cancel
from llm.devices.model import Model
from llm.engine.engine import Engine
from llm.engine.scheduler import MOST_ROWS
from llm.engine.sequence import Generation, Request, Sampling
from llm.errors import UserError
from llm.text.detokenizer import Text, split_stop_sequences
from llm.text.prompt import Prompter
from llm.weights import hub
from llm.weights.settings import Settings
from llm.words import decimal, thousands


class Predictor(BasePredictor):
    def setup(self) -> None:  # type: ignore[override]
        """Bring the weights where they are missing, load the model, start the engine."""
        start = time.perf_counter()
        settings = Settings.read()
        weights = hub.ensure(settings, say=print)
        self.model = Model.load(weights, settings, say=print)
        self.engine = Engine(self.model, MOST_ROWS, share_prefixes=settings.share_prefixes, say=print)
        self.prompter = Prompter(self.model.tokenizer, self.engine.context, self.model.vocabulary)
        prefix = []
        try:
            prefix = self.prompter.prefix()
        except UserError as error:
            print(f"Sin prompt_template ninguna pregunta tendrá respuesta. {error}")
        self.engine.start(prefix)
        follow_cancels(cog.CancelationException)
        print(f"Listo en {decimal(time.perf_counter() - start)} s")

    async def healthcheck(self) -> bool:
        """Raises UserError where no prediction can be served: /health-check then says UNHEALTHY, and why."""
        if failure := self.engine.failure:
            raise UserError(failure)
        return True

    @streaming
    @cog.concurrent(max=32)
    async def predict(
        self,
        pregunta: str = Input(
            description="La pregunta, o el texto que hay que continuar.", min_length=1, max_length=100000
        ),
        max_tokens: int = Input(
            description="Cuántos tokens nuevos como máximo; menos si antes se acaba el contexto.",
            default=128,
            ge=1,
            le=2048,
        ),
        temperature: float = Input(
            description="0 elige siempre el token más probable; más alto, más variedad.",
            default=0.7,
            ge=0,
            le=2,
        ),
        top_p: float = Input(
            description="Elige entre los tokens más probables que suman esta probabilidad; 1 lo desactiva, 0 deja solo el más probable.",
            default=0.95,
            ge=0,
            le=1,
        ),
        top_k: int = Input(
            description="Elige entre este número de tokens más probables; 0 lo desactiva.", default=50, ge=0, le=1000
        ),
        repetition_penalty: float = Input(
            description="Por encima de 1 evita repetir lo ya dicho; 1 lo desactiva.", default=1.1, ge=1, le=2
        ),
        stop_sequences: Optional[str] = Input(
            description=r"Textos separados por comas, 32 como mucho, con \n por salto de línea; la respuesta acaba antes del primero que aparezca.",
            default=None,
            max_length=1000,
        ),
        seed: Optional[int] = Input(
            description="En una CPU, la misma semilla con las mismas entradas da el mismo texto; en una GPU, salvo algún token si hay más preguntas a la vez. Sin ella, o con -1, se elige una al azar.",
            default=None,
        ),
        prompt_template: Optional[str] = Input(
            description="Plantilla con {pregunta} donde va la pregunta; {pregunta} solo la envía tal cual.",
            default=None,
            max_length=1000000,
        ),
    ) -> AsyncConcatenateIterator[str]:
        """Responde a una pregunta, palabra a palabra."""
        # the server lets 2.0 pass for an integer, and hands it on as it came
        max_tokens, top_k = int(max_tokens), int(top_k)
        # `cog predict` takes no larger one than 31 bits
        seed = random.getrandbits(31) if seed in (None, -1) else int(seed) % 2**63
        stops = split_stop_sequences(stop_sequences)
        # in a thread: a long question takes a while to tokenize, and other predictions start meanwhile
        prompt = await asyncio.to_thread(self.prompter.encode, pregunta, prompt_template)
        sampling = Sampling(temperature, top_p, top_k, repetition_penalty, seed)
        continued = prompt.ids if prompt.continues else []
        text = Text(self.model.tokenizer, stops + prompt.stop_sequences, continued)
        generation = self.engine.generate(Request(prompt.ids, max_tokens, sampling, prompt.stop_ids))
        answer = self.answer(generation, text, contextvars.copy_context())
        # Cog streams a plain generator, not an async one, and runs it in a thread of its own. Whatever ends the answer
        # gives its row back:
        # - its last token, a stop sequence, an error of the engine, a client who hangs up: the `finally` of `answer`
        # - a cancel, before the first token or after: `on_cancel`
        # - a generator that Cog drops without ever starting it: `finalize`
        on_cancel(generation.cancel)
        weakref.finalize(answer, generation.cancel)
        return answer  # type: ignore[return-value]

    def answer(self, generation: Generation, text: Text, prediction: contextvars.Context) -> Iterator[str]:
        """The answer's text as it grows, and at the end its metrics and its line in the log."""
        try:
            for tokens in generation:
                chunk = text.add(tokens)
                if text.stopped:
                    # before the last chunk, which a slow client may leave waiting
                    generation.cancel()
                    generation.consumed -= text.unused
                if chunk:
                    yield chunk
                if text.stopped:
                    break
            if chunk := text.end():
                yield chunk
            prediction.run(self.report, generation, text)
        finally:
            generation.cancel()

    def report(self, generation: Generation, text: Text) -> None:
        """Record the metrics, and log one line without the question's text."""
        reason = "stop" if text.stopped else generation.finish_reason
        self.record_metric("input_token_count", len(generation.request.prompt))
        self.record_metric("cached_token_count", generation.cached_tokens)
        self.record_metric("output_token_count", generation.consumed)
        self.record_metric("queue_time", generation.queue_time)
        self.record_metric("time_to_first_token", generation.time_to_first_token)
        self.record_metric("tokens_per_second", generation.tokens_per_second)
        self.record_metric("finish_reason", reason)
        end = "acabó la respuesta" if reason == "stop" else "llegó al máximo de tokens"
        if reason == "length" and generation.budget < generation.request.max_tokens:
            end = f"se acabó el contexto, que dejaba sitio para {generation.budget} tokens"
        print(
            f"{thousands(len(generation.request.prompt))} tokens de entrada, {thousands(generation.cached_tokens)} ya "
            f"leídos, {generation.consumed} de salida, "
            f"{decimal(generation.tokens_per_second)} tokens/s, semilla {generation.request.sampling.seed}: {end}"
        )
