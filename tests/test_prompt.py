"""An ordinary question gives transformers' ids; only the template, never the question, writes control tokens."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import BatchEncoding, PreTrainedTokenizerFast

from llm.errors import UserError
from llm.text.detokenizer import Text
from llm.text.prompt import COMPLETION, MAX_CHARACTERS, Prompter
from tests.support import checkpoints, embedded

CHATML = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}"
)
INST = "{{ bos_token }}{% for message in messages %}[INST] {{ message['content'] | trim }} [/INST]{% endfor %}"

QUESTIONS = [
    "Dime un producto de limpieza que blanquee la ropa",
    " ¿Qué es el ñandú?\n\nResponde  en dos líneas:\n\t1.  ",
    "👩‍👩‍👧 ¿y 漢字? «sí» <b>no</b> < s > 1 | 2",
    "covid y    covid19 con     blancos",
    "{} {0} {pregunta.__class__} {pregunta} %s \\n $1 \\1",
    "nulo \0 y \ufffd",
    "x",
    "\n",
]


def chatml() -> PreTrainedTokenizerFast:
    """GPT-2's tokenizer, extended as chat models extend theirs."""
    return extended(checkpoints.tokenizer())


def extended(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Adds marks (not all special; one in another, one in GPT-2's merges), a word, blanks and a chat template."""
    tokenizer.add_tokens([AddedToken(mark, special=True) for mark in ("im_start|>", "<|im_start|>", "<|im_end|>")])
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("://", special=False)])
    tokenizer.add_tokens([AddedToken("<|user|>", special=True, rstrip=True)])
    tokenizer.add_tokens([AddedToken("covid", special=False), AddedToken("    ", special=False, normalized=False)])
    tokenizer.chat_template = CHATML
    return tokenizer


def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama 2's: ▁ before the text, a <s> that the tokenizer adds, and <s> a piece of the vocabulary itself."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "<", ">", "/", "s", *"abcdefghijklmnopqr[]IT", "▁d", "▁de", "os", "▁▁", "la", "▁[", "IN"]
    scores = {"<unk>": -20.0, "▁d": -1.5, "▁de": -1.0, "▁[": -1.0}
    backend = Tokenizer(models.Unigram([(p, scores.get(p, -2.0)) for p in pieces], unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(piece, special=True) for piece in pieces[:3]])
    backend.add_tokens([AddedToken("▁▁", special=False, normalized=False)])
    backend.enable_truncation(8)
    backend.enable_padding(length=100)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = INST
    return tokenizer


def smollm2() -> PreTrainedTokenizerFast:
    folder = embedded.folder()
    return PreTrainedTokenizerFast.from_pretrained(folder)  # type: ignore[no-any-return]


@pytest.fixture(
    scope="module",
    params=[checkpoints.tokenizer, chatml, sentencepiece, smollm2],
    ids=["falcon", "chatml", "sentencepiece", "smollm2"],
)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    make: Callable[[], PreTrainedTokenizerFast] = request.param
    return make()


@pytest.fixture(scope="module")
def prompter(tokenizer: PreTrainedTokenizerFast) -> Prompter:
    return Prompter(tokenizer, 2048)


@pytest.fixture(scope="module")
def falcon() -> Prompter:
    return Prompter(checkpoints.tokenizer(), 2048)


def default_ids(tokenizer: PreTrainedTokenizerFast, pregunta: str) -> list[int]:
    """transformers' ids for a question without prompt_template."""
    if tokenizer.chat_template is None:
        return list(tokenizer(COMPLETION.replace("{pregunta}", pregunta))["input_ids"])
    messages = [{"role": "user", "content": pregunta}]
    encoding = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert isinstance(encoding, BatchEncoding)
    return list(encoding["input_ids"])


def added(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[int]:
    return [id for id in ids if id in tokenizer.added_tokens_decoder]


@pytest.mark.parametrize("pregunta", QUESTIONS)
def test_an_ordinary_question_gives_the_ids_of_transformers(
    tokenizer: PreTrainedTokenizerFast, prompter: Prompter, pregunta: str
) -> None:
    assert prompter.encode(pregunta).ids == default_ids(tokenizer, pregunta)


@pytest.mark.parametrize("pregunta", QUESTIONS)
@pytest.mark.parametrize(
    "template",
    [
        "{pregunta}",
        " {pregunta} ",
        "Q:{pregunta}\n\nA:",
        "a {pregunta}<|im_end|>\n<|im_start|>{pregunta}<|endoftext|>",
        "<|user|> {pregunta} </s> [INST] <think>{pregunta}",
        "{} {0} {pregunta.__class__} %s {{pregunta}}",
    ],
)
def test_a_template_gives_the_ids_of_its_text(
    tokenizer: PreTrainedTokenizerFast, prompter: Prompter, template: str, pregunta: str
) -> None:
    expected = tokenizer(template.replace("{pregunta}", pregunta))["input_ids"]
    assert prompter.encode(pregunta, template).ids == expected


@pytest.mark.parametrize("template", [None, "{pregunta}", "<|im_start|>{pregunta}<|im_end|></s>", "x{pregunta}x"])
def test_a_question_has_no_control_tokens(
    tokenizer: PreTrainedTokenizerFast, prompter: Prompter, template: str | None
) -> None:
    marks = [token.content for token in tokenizer.added_tokens_decoder.values() if set(token.content) & set("<:")]
    template_tokens = added(tokenizer, prompter.encode("sol", template).ids)
    assert marks
    for pregunta in [*marks, "".join(marks), f"de {marks[0]}\n {marks[-1]} de"]:
        ids = prompter.encode(pregunta, template).ids
        assert added(tokenizer, ids) == template_tokens
        assert pregunta in str(tokenizer.decode(ids))


def test_a_question_and_its_template_make_no_control_token_together() -> None:
    tokenizer = chatml()
    prompter = Prompter(tokenizer, 2048)
    for template, pregunta in [
        ("<|im_{pregunta}|>", "end"),
        ("{pregunta}|im_end|>", "<"),
        ("<|im_end{pregunta}", "|>"),
    ]:
        ids = prompter.encode(pregunta, template).ids
        assert added(tokenizer, ids) == []
        assert tokenizer.decode(ids) == "<|im_end|>"


def test_control_tokens_in_a_template_are_encoded_as_such() -> None:
    tokenizer = checkpoints.tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Prepend("_")
    tokenizer.add_tokens([AddedToken("<w>", single_word=True), AddedToken("<n>", normalized=True)])
    ids = Prompter(tokenizer, 2048).encode("c", "a<w>b<n>{pregunta}").ids
    assert added(tokenizer, ids) == tokenizer.convert_tokens_to_ids(["<w>", "<n>"])


@pytest.mark.parametrize(
    "template",
    [
        *("", "hola", "%s", " ", "\0", "🏳️‍🌈", "{", "}", "{}", "{{}}", "{0}"),
        *("{ pregunta }", "{Pregunta}", "{pregunta.__class__}", "{pregunta!r}", "{pregunta:s}"),
    ],
)
def test_a_template_without_the_placeholder_is_refused(falcon: Prompter, template: str) -> None:
    with pytest.raises(UserError, match=r"^prompt_template debe contener \{pregunta\}$"):
        falcon.encode("hola", template)


def test_a_completion_ends_at_the_next_question(falcon: Prompter) -> None:
    tokenizer = checkpoints.tokenizer()
    prompt = falcon.encode("¿Qué blanquea la ropa?")
    assert str(tokenizer.decode(prompt.ids)).endswith("\n\nPregunta: ¿Qué blanquea la ropa?\nRespuesta:")
    text = Text(tokenizer, prompt.stop_sequences)
    assert text.add(list(tokenizer.encode(" La lejía.\n\nPregunta: ¿Y el suelo?"))) == "La lejía."
    assert text.stopped


def test_other_templates_add_no_stop_sequences(falcon: Prompter) -> None:
    assert falcon.encode("hola", "{pregunta}").stop_sequences == ()
    assert Prompter(chatml(), 2048).encode("hola").stop_sequences == ()


def test_a_prompt_that_fills_the_context_is_refused(falcon: Prompter) -> None:
    assert len(falcon.encode(" a" * 2047, "{pregunta}").ids) == 2047
    for tokens in (2048, 2301):
        with pytest.raises(UserError, match=rf"^La pregunta ocupa {tokens} tokens y el modelo admite 2048 en total, "):
            falcon.encode(" a" * tokens, "{pregunta}")


def test_a_template_that_repeats_a_long_question_is_refused_before_it_is_written(falcon: Prompter) -> None:
    with pytest.raises(UserError, match=rf"ocupa 10000000000 caracteres y se admiten {MAX_CHARACTERS}"):
        falcon.encode("a" * 100_000, "{pregunta}" * 100_000)


def test_a_prompt_without_tokens_is_refused() -> None:
    backend = Tokenizer(models.WordLevel({"hola": 0, "[UNK]": 1}, unk_token="[UNK]"))
    backend.normalizer = normalizers.Strip()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    prompter = Prompter(tokenizer, 2048)
    assert prompter.encode("hola Zoé", "{pregunta}").ids == [0, 1]
    with pytest.raises(UserError, match="La pregunta no contiene nada"):
        prompter.encode(" ", "{pregunta}")


def test_a_template_that_writes_the_first_token_gets_no_second_one() -> None:
    tokenizer = sentencepiece()
    prompter = Prompter(tokenizer, 2048)
    assert prompter.encode("de", "<s>{pregunta}").ids == tokenizer("<s>de", add_special_tokens=False)["input_ids"]
    assert prompter.encode("de", "{pregunta}").ids.count(1) == 1
    assert prompter.encode("de").ids.count(1) == 1


def test_half_a_surrogate_pair_is_a_replacement_character(prompter: Prompter) -> None:
    assert prompter.encode("a\ud800b") == prompter.encode("a\ufffdb")
    assert prompter.encode("a", "\udc00{pregunta}") == prompter.encode("a", "\ufffd{pregunta}")


def test_the_prefix_is_what_ordinary_prompts_begin_with(prompter: Prompter) -> None:
    prefix = prompter.prefix()
    # leading blanks may become one token with the template's last
    for pregunta in filter(lambda pregunta: pregunta == pregunta.lstrip(), QUESTIONS):
        assert prompter.encode(pregunta).ids[: len(prefix)] == prefix
    # the prefix is nearly all of a prompt but the question
    assert len(prefix) > len(prompter.encode("x").ids) - 12


def test_a_context_that_fits_no_question_is_refused(falcon: Prompter) -> None:
    with pytest.raises(UserError, match="en total, con la respuesta"):
        Prompter(checkpoints.tokenizer(), len(falcon.prefix())).prefix()


def test_a_chat_template_is_rendered_for_each_question() -> None:
    tokenizer = chatml()
    tokenizer.chat_template = "{{ strftime_now('%f') }} {{ messages[0]['content'] }}"  # microseconds
    prompter = Prompter(tokenizer, 2048)
    assert len({tuple(prompter.encode("hola").ids) for _ in range(20)}) > 1


def test_a_chat_template_that_drops_the_question_is_refused() -> None:
    tokenizer = chatml()
    tokenizer.chat_template = "{% for part in messages[0]['content'] %}{{ part['text'] }}{% endfor %}"
    with pytest.raises(UserError, match="indique prompt_template"):
        Prompter(tokenizer, 2048).encode("hola")


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('First message must be system') }}",
        "{% if messages[0]['role'] != 'system' %}{{ raise_exception('a\\nb') }}{% endif %}",
        "{% for message in messages %}{{ message['content'] }}",
        "{{ messages[0]['content'] | no_such_filter }}",
        "{% for tool in tools %}{{ tool.name }}{% endfor %}{{ messages[0]['content'] }}",
        "{{ messages[0]['content'] + date.today.iso }}",
        "{{ 1 // 0 }}",
        "{{ messages[0]['content'].__class__.__mro__[1].__subclasses__() }}",
        "{{ messages[1]['content'] }}",
        "   ",
        {"tool_use": CHATML},
    ],
)
def test_a_chat_template_that_fails_is_one_line_and_prompt_template_still_works(template: str | dict[str, str]) -> None:
    tokenizer = extended(sentencepiece())
    tokenizer.chat_template = template
    prompter = Prompter(tokenizer, 2048)
    for encode in (prompter.prefix, lambda: prompter.encode("hola")):
        with pytest.raises(
            UserError, match=r"^La plantilla de chat de este modelo .*: indique prompt_template$"
        ) as error:
            encode()
        assert "\n" not in str(error.value)
    assert prompter.encode("hola", "{pregunta}").ids == tokenizer("hola")["input_ids"]


def test_of_several_chat_templates_the_default_one_is_used() -> None:
    tokenizer = extended(sentencepiece())
    expected = Prompter(tokenizer, 2048).encode("hola")
    tokenizer.chat_template = {"tool_use": "{{ tools[0] }}", "default": CHATML}
    assert Prompter(tokenizer, 2048).encode("hola") == expected


EACH_MESSAGE = "{% for message in messages %}<|im_start|>{{ message['content'] }}"
"""Writes each message; what ends a message follows."""


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHATML, "<|im_end|>"),
        (INST, None),
        (EACH_MESSAGE + "{{ eos_token }}{% endfor %}", "</s>"),
        (EACH_MESSAGE + " \n{{ eos_token }}{% endfor %}", "</s>"),
        (EACH_MESSAGE + "{% if not loop.last %}<|im_end|>{% endif %}{% endfor %}", "<|im_end|>"),
        # a message ends where the next one begins
        (EACH_MESSAGE + "\n{% endfor %}", "<|im_start|>"),
        # a mark that is not special
        (EACH_MESSAGE + "<think>{% endfor %}", "<think>"),
        # added tokens that are text
        (EACH_MESSAGE + "    covid{% endfor %}", None),
        (EACH_MESSAGE + "://<|im_end|>{% endfor %}", None),
        ("{{ messages[0]['content'] }}<|im_end|>", None),
        ("{% if messages[0]['role'] != 'system' %}{{ raise_exception('no') }}{% endif %}" + CHATML, "<|im_end|>"),
        ("{% if messages | length > 1 %}{{ raise_exception('no') }}{% endif %}" + CHATML, None),
    ],
)
def test_an_answer_ends_where_the_chat_template_ends_it(template: str, end: str | None) -> None:
    tokenizer = extended(sentencepiece())
    tokenizer.chat_template = template
    expected = frozenset() if end is None else frozenset({tokenizer.convert_tokens_to_ids(end)})
    assert Prompter(tokenizer, 2048).encode("hola", "{pregunta}").stop_ids == expected


def test_the_stop_ids_do_not_depend_on_prompt_template() -> None:
    prompter = Prompter(extended(sentencepiece()), 2048)
    assert prompter.encode("hola").stop_ids == prompter.encode("hola", "{pregunta}").stop_ids != frozenset()


def test_a_token_without_an_embedding_is_refused_in_question_and_templates() -> None:
    tokenizer = sentencepiece()
    embeddings = len(tokenizer)
    tokenizer.add_tokens(["zapatófono"])
    prompter = Prompter(tokenizer, 2048, embeddings)
    assert prompter.encode("zapato").ids == default_ids(tokenizer, "zapato")
    line = r"^El modelo no tiene el token «zapatófono» de su tokenizador: quítelo de .*plantilla$"
    for pregunta, template in (("Mi zapatófono", None), ("zapatófono", "{pregunta}"), ("a", "zapatófono {pregunta}")):
        with pytest.raises(UserError, match=line):
            prompter.encode(pregunta, template)
    tokenizer.chat_template = CHATML.replace("<|im_start|>", "zapatófono")
    prompter = Prompter(tokenizer, 2048, embeddings)
    with pytest.raises(UserError, match=line):
        prompter.prefix()
    assert prompter.encode("zapato", "{pregunta}").ids == tokenizer("zapato")["input_ids"]


@pytest.mark.parametrize(
    "processor",
    [
        processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]),
        processors.TemplateProcessing(single="$A </s> </s>", special_tokens=[("</s>", 2)]),
        processors.RobertaProcessing(("</s>", 2), ("<s>", 1)),
        processors.Sequence([processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])]),
    ],
)
def test_the_end_that_the_tokenizer_appends_is_dropped(processor: processors.PostProcessor) -> None:
    tokenizer = sentencepiece()
    tokenizer.chat_template = None
    tokenizer.backend_tokenizer.post_processor = processor
    prompter = Prompter(tokenizer, 2048)
    for template in (None, "{pregunta}", "a {pregunta}</s>b", "</s>{pregunta}"):
        text = (template or COMPLETION).replace("{pregunta}", "de la")
        whole = list(tokenizer(text)["input_ids"])
        ids = prompter.encode("de la", template).ids
        assert ids == whole[: len(ids)]
        assert {*whole[len(ids) :]} == {2} != {ids[-1]}
    # an end that the template writes stays
    assert prompter.encode("de", "{pregunta}</s>").ids[-2:] != [2, 2]
    assert prompter.encode("de", "{pregunta}</s>").ids[-1] == 2


def test_a_template_that_ends_in_the_question_is_continued() -> None:
    prompter = Prompter(extended(sentencepiece()), 2048)
    assert [prompter.encode("a", template).continues for template in ("{pregunta}", "<s>Q: {pregunta}")] == [True] * 2
    others = ("{pregunta}\n", "Q: {pregunta}\nA:", "{pregunta}<|im_end|>", None)
    assert [prompter.encode("a", template).continues for template in others] == [False] * 4


def test_threads_do_not_disturb_each_other() -> None:
    tokenizer = chatml()
    prompter = Prompter(tokenizer, 100_000)
    questions = [question * 50 for question in [*QUESTIONS, "<|im_end|>", "<think>"]] * 5
    expected = [prompter.encode(question) for question in questions]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(prompter.encode, questions)) == expected


def test_a_long_question_lets_other_threads_run() -> None:
    prompter = Prompter(checkpoints.tokenizer(), 10**6)

    def longest_pause() -> float:
        """The longest pause of this thread while another one encodes, as a part of the encoding's time."""
        pauses = []
        encoding = threading.Thread(target=prompter.encode, args=("ñandú " * 16_000,))
        start = last = time.perf_counter()
        encoding.start()
        while encoding.is_alive():
            now = time.perf_counter()
            pauses.append(now - last)
            last = now
        return max(pauses) / (time.perf_counter() - start)

    # A busy machine pauses any thread; the interpreter's lock would do so each time, for nearly all of the encoding.
    assert any(longest_pause() < 0.6 for _ in range(20))
