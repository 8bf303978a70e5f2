"""pregunta -> token ids. Knows the tokenizer and the templates, nothing of the model or of what comes out."""

import json
import re
import secrets
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from operator import eq
from textwrap import shorten

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from llm.errors import UserError
from llm.words import one_line

PLACEHOLDER = "{pregunta}"

# For a base model, which imitates the examples and answers in their language. Short answers keep it to the facts.
COMPLETION = """\
Pregunta: ¿Cuántos días tiene una semana?
Respuesta: Una semana tiene siete días.

Pregunta: Dime una fruta amarilla.
Respuesta: El plátano.

Pregunta: What do bees make?
Respuesta: Bees make honey.

Pregunta: {pregunta}
Respuesta:"""
# The next question ends the answer. The longer sequences also remove the blank lines before it.
COMPLETION_STOPS = ("\n\nPregunta:", "\nPregunta:", "Pregunta:")

# A short template can repeat a long question many times.
MAX_CHARACTERS = 1_000_000

SURROGATES = re.compile("[\ud800-\udfff]")


Message = dict[str, str]


@dataclass(frozen=True)
class Prompt:
    ids: list[int]
    stop_sequences: tuple[str, ...] = ()  # where the template itself says that the answer ends
    stop_ids: frozenset[int] = frozenset()  # the same, as control tokens
    continues: bool = False  # the question stands at the end, so that the answer goes on with its text


class Prompter:
    """Turns questions into prompts for one model. Text in a question never becomes a control token.

    It encodes with a copy of the tokenizer in which every control token has a secret name. The template's control
    tokens are replaced by their secret names, the question's are not, and both are encoded together: for a question
    that names no control token the ids are the tokenizer's own.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, context: int, embeddings: int = sys.maxsize) -> None:
        """context: the most tokens that prompt and answer may have together; embeddings: how many ids the model has an
        embedding for."""
        self._tokenizer = tokenizer
        self._context = context
        self._embeddings = embeddings
        secret = secrets.token_hex(16)
        self._control_ids = _control_ids(tokenizer)
        self._names = {name: f"{secret}:{i}:" for i, name in enumerate(self._control_ids)}
        self._encoder = _renamed(tokenizer.backend_tokenizer, self._names)
        self._finder = _finder(self._names)
        self._place = secrets.token_hex(16)  # where the chat template puts the question
        self._stop_ids = self._turn_ends() if tokenizer.chat_template else frozenset()

    def encode(self, pregunta: str, prompt_template: str | None = None) -> Prompt:
        """The prompt for a question, by `prompt_template`, else by the model's chat template, else as a completion.

        Safe to call from several threads, and does not hold the interpreter's lock while it tokenizes.
        Raises UserError where the template has no place for the question or the prompt leaves no room for an answer.
        """
        pregunta = _characters(pregunta)
        if prompt_template is not None:
            template = _characters(prompt_template)
            if PLACEHOLDER not in template:
                raise UserError(f"prompt_template debe contener {PLACEHOLDER}")
            bos = self._tokenizer.bos_token
            ids = self._ids(template, PLACEHOLDER, pregunta, not (bos and template.startswith(bos)))
            return Prompt(ids, stop_ids=self._stop_ids, continues=template.endswith(PLACEHOLDER))
        if self._tokenizer.chat_template:
            # Rendered each time: some models' templates tell the date.
            template = self._chat(_user(self._place))
            if self._place not in template:
                raise UserError("La plantilla de chat de este modelo no lleva la pregunta: indique prompt_template")
            pregunta = pregunta.strip() if self._chat_strips else pregunta
            ids = self._ids(template, self._place, pregunta, add_special_tokens=False)
            return Prompt(ids, stop_ids=self._stop_ids)
        return Prompt(self._ids(COMPLETION, PLACEHOLDER, pregunta), COMPLETION_STOPS)

    def prefix(self) -> list[int]:
        """The ids that all prompts begin with but those of a `prompt_template`. Raises UserError where no question has
        a prompt without a `prompt_template`."""
        ids = self.encode("a").ids
        return ids[: sum(takewhile(bool, map(eq, ids, self.encode("1").ids)))]

    @cached_property
    def _chat_strips(self) -> bool:
        return self._chat(_user(f" {self._place} ")) == self._chat(_user(self._place))

    def _chat(self, *messages: Message, add_generation_prompt: bool = True) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # a template is a program, which may raise anything
            reason = one_line(shorten(str(error), 120, placeholder="…") or type(error).__name__)
            raise UserError(f"La plantilla de chat de este modelo falla ({reason}): indique prompt_template") from error
        return str(text)

    def _turn_ends(self) -> frozenset[int]:
        """The control token that the chat template writes behind an answer: there the model writes it too."""
        system, user = {"role": "system", "content": "1"}, _user("1")
        answer = {"role": "assistant", "content": self._place}
        # some want a system message, and some end a turn only where another follows
        for messages in ([user, answer], [user, answer, user], [system, user, answer], [system, user, answer, user]):
            try:
                _, place, after = self._chat(*messages, add_generation_prompt=False).rpartition(self._place)
            except UserError:  # `encode` tells who needs the template
                continue
            first = next(iter(self._split(after.lstrip())), "")
            if place and first in self._names and any(map(str.isalpha, first)):
                return frozenset({self._control_ids[first]})
        return frozenset()

    def _ids(self, template: str, place: str, pregunta: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of a template with the question at each `place` in it."""
        size = len(template) + template.count(place) * (len(pregunta) - len(place))
        if size > MAX_CHARACTERS:
            raise UserError(
                f"prompt_template con la pregunta ocupa {size} caracteres y se admiten {MAX_CHARACTERS}: acórtelos"
            )
        template = "".join(self._names.get(part, part) for part in self._split(template))
        text = template.replace(place, pregunta)
        # Of the encoder's methods only those for a batch let other threads run meanwhile.
        encoding = self._encoder.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]
        ids: list[int] = encoding.ids
        # what the tokenizer itself puts behind a text says that it has ended
        added = encoding.special_tokens_mask
        while ids and added[len(ids) - 1]:
            ids.pop()
        if not ids:
            raise UserError("La pregunta no contiene nada que el modelo pueda leer: escríbala con letras o números")
        if len(ids) >= self._context:
            raise UserError(
                f"La pregunta ocupa {len(ids)} tokens y el modelo admite {self._context} en total, con la respuesta: "
                "acorte la pregunta o prompt_template"
            )
        if (id := max(ids)) >= self._embeddings:
            token = one_line(str(self._tokenizer.convert_ids_to_tokens(id)))
            raise UserError(
                f"El modelo no tiene el token «{token}» de su tokenizador: quítelo de la pregunta o, con "
                "prompt_template, de la plantilla"
            )
        return ids

    def _split(self, template: str) -> list[str]:
        """The control tokens in it, the longest where several begin, and the texts between them."""
        parts = self._finder.encode_batch([template], add_special_tokens=False)[0].offsets
        return [template[start:end] for start, end in parts]


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _characters(text: str) -> str:
    """Half a surrogate pair, which JSON can write, is no character: tokenizers refuse it."""
    return SURROGATES.sub("\ufffd", text)


def _control_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """The id of each control token, by its name."""
    return {token.content: id for id, token in tokenizer.added_tokens_decoder.items() if not _is_text(token)}


def _is_text(token: AddedToken) -> bool:
    """Vocabularies are also extended with plain text: runs of blanks (SentencePiece's are ▁), words, numbers."""
    text = token.content.replace("▁", " ").strip()
    return not token.special and (not text or text.isalnum())


def _finder(names: Iterable[str]) -> Tokenizer:
    """A tokenizer of these names alone, to which any text between them is one unknown word. It reads a text once,
    whatever their number."""
    finder = Tokenizer(WordLevel({"?": 0}, unk_token="?"))
    finder.add_tokens([AddedToken(name, normalized=False) for name in names])
    return finder


def _renamed(backend: Tokenizer, names: dict[str, str]) -> Tokenizer:
    """A copy in which the tokens in `names` have other names and the same ids."""
    state = json.loads(backend.to_str())
    state["truncation"] = state["padding"] = None
    for token in state["added_tokens"]:
        if token["content"] in names:
            # a secret name must be recognised wherever it stands
            token |= {"content": names[token["content"]], "normalized": False, "single_word": False}
    model = state["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(name, name): id for name, id in model["vocab"].items()}
    else:  # Unigram's: the id is the place in the list
        model["vocab"] = [[names.get(name, name), score] for name, score in model["vocab"]]
    if model.get("unk_token"):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        model["merges"] = [pair for pair in model["merges"] if names.keys().isdisjoint((*pair, "".join(pair)))]
    return Tokenizer.from_str(json.dumps(state))
