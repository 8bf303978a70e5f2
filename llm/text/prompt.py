"""pregunta -> token ids. Knows the tokenizer and the templates, nothing of the model or of what comes out."""

import json
import re
import secrets
from dataclasses import dataclass
from itertools import takewhile

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from llm.errors import UserError

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


@dataclass(frozen=True)
class Prompt:
    ids: list[int]
    stop_sequences: tuple[str, ...] = ()  # where the template itself says that the answer ends


class Prompter:
    """Turns questions into prompts for one model. Text in a question never becomes a control token.

    It encodes with a copy of the tokenizer in which every control token has a secret name. The template's control
    tokens are replaced by their secret names, the question's are not, and both are encoded together: for a question
    that names no control token the ids are the tokenizer's own.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, context: int) -> None:
        """context: the most tokens that prompt and answer may have together."""
        self._tokenizer = tokenizer
        self._context = context
        secret = secrets.token_hex(16)
        control_tokens = sorted(_control_tokens(tokenizer), key=len, reverse=True)
        self._names = {name: f"{secret}:{i}:" for i, name in enumerate(control_tokens)}
        self._encoder = _renamed(tokenizer.backend_tokenizer, self._names)
        self._place = secrets.token_hex(16)  # where the chat template puts the question
        has_chat = bool(tokenizer.chat_template)
        self._chat_strips = has_chat and self._chat(f" {self._place} ") == self._chat(self._place)

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
            return Prompt(self._ids(template, PLACEHOLDER, pregunta, not (bos and template.startswith(bos))))
        if self._tokenizer.chat_template:
            # Rendered each time: some models' templates tell the date.
            template = self._chat(self._place)
            if self._place not in template:
                raise UserError("La plantilla de chat de este modelo no lleva la pregunta: indique prompt_template")
            pregunta = pregunta.strip() if self._chat_strips else pregunta
            return Prompt(self._ids(template, self._place, pregunta, add_special_tokens=False))
        return Prompt(self._ids(COMPLETION, PLACEHOLDER, pregunta), COMPLETION_STOPS)

    def prefix(self) -> list[int]:
        """The ids that all prompts begin with but those of a `prompt_template`."""
        try:
            pairs = zip(self.encode("a").ids, self.encode("1").ids, strict=False)
            return [id for id, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
        except UserError:  # no question has a prompt: each will be told why
            return []

    def _chat(self, content: str) -> str:
        message = {"role": "user", "content": content}
        return str(self._tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True))

    def _ids(self, template: str, place: str, pregunta: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of a template with the question at each `place` in it."""
        size = len(template) + template.count(place) * (len(pregunta) - len(place))
        if size > MAX_CHARACTERS:
            raise UserError(
                f"prompt_template con la pregunta ocupa {size} caracteres y se admiten {MAX_CHARACTERS}: acórtelos"
            )
        # The longest names first: one may be part of another.
        for name, secret in self._names.items():
            template = template.replace(name, secret)
        text = template.replace(place, pregunta)
        # Of the encoder's methods only those for a batch let other threads run meanwhile.
        ids: list[int] = self._encoder.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        if not ids:
            raise UserError("La pregunta no contiene nada que el modelo pueda leer: escríbala con letras o números")
        if len(ids) >= self._context:
            raise UserError(
                f"La pregunta ocupa {len(ids)} tokens y el modelo admite {self._context} en total, con la respuesta: "
                "acorte la pregunta o prompt_template"
            )
        return ids


def _characters(text: str) -> str:
    """Half a surrogate pair, which JSON can write, is no character: tokenizers refuse it."""
    return SURROGATES.sub("\ufffd", text)


def _control_tokens(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [token.content for token in tokenizer.added_tokens_decoder.values() if not _is_text(token)]


def _is_text(token: AddedToken) -> bool:
    """Vocabularies are also extended with plain text: runs of blanks (SentencePiece's are ▁), words, numbers."""
    text = token.content.replace("▁", " ").strip()
    return not token.special and (not text or text.isalnum())


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
