"""Every text is compared with the obvious way: decode all tokens at once, drop half a character, strip, cut."""

import random
from collections.abc import Sequence
from functools import lru_cache

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llm.errors import UserError
from llm.text.detokenizer import CONTEXT, MOST_STOP_SEQUENCES, Text, _Characters, split_stop_sequences
from tests.support import checkpoints, embedded

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def sentencepiece(decoder: decoders.Decoder) -> PreTrainedTokenizerFast:
    """A small vocabulary as SentencePiece makes them: ▁ for blanks, bytes for what it lacks."""
    pieces = ["<unk>", "<s>", "</s>", *BYTES, "▁", "▁Hola", "▁casa", "ñ", "o", "a", ",", "\ufffd", "▁▁", "▁a", "漢"]
    unigram = models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0, byte_fallback=True)
    backend = Tokenizer(unigram)
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoder
    backend.add_special_tokens([AddedToken(piece, special=True) for piece in pieces[:3]])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module", params=["falcon", "smollm2", "llama", "metaspace"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    if request.param == "falcon":
        return checkpoints.tokenizer()
    if request.param == "smollm2":
        folder = embedded.folder()
        return PreTrainedTokenizerFast.from_pretrained(folder)  # type: ignore[no-any-return]
    if request.param == "llama":
        blanks = decoders.Replace("▁", " ")
        return sentencepiece(
            decoders.Sequence([blanks, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
        )
    return sentencepiece(decoders.Metaspace())


@pytest.fixture(scope="module")
def falcon() -> PreTrainedTokenizerFast:
    return checkpoints.tokenizer()


def all_at_once(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[int], stops: Sequence[str] = ()) -> str:
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    shown = [id for id in tokens if id < len(tokenizer) and id not in special]
    text = str(tokenizer.decode(shown))
    if shown and tokenizer.convert_ids_to_tokens(shown[-1]) in BYTES:
        # half a character spoils the whole run of bytes
        ends = (str(tokenizer.decode(shown[: len(shown) - cut])) for cut in range(4))
        text = next((end for end in ends if not end.endswith("\ufffd")), text)
    text = text.removesuffix("\ufffd").lstrip()
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def as_it_grows(
    tokenizer: PreTrainedTokenizerFast, tokens: Sequence[int], stops: Sequence[str] = (), most: int = 1
) -> list[str]:
    """The chunks of `Text` for calls with up to `most` tokens each."""
    return chunks_of(Text(tokenizer, stops), tokens, most)


def chunks_of(text: Text, tokens: Sequence[int], most: int = 1) -> list[str]:
    rng = random.Random(0)
    chunks = []
    at = 0
    while at < len(tokens):
        step = rng.randint(1, most)
        chunks.append(text.add(tokens[at : at + step]))
        at += step
    return [*chunks, text.end()]


def plain(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def named(tokenizer: PreTrainedTokenizerFast, *names: str) -> list[int]:
    return [id for name in names if (id := tokenizer.backend_tokenizer.token_to_id(name)) is not None]


@lru_cache
def parts_of_characters(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The tokens that hold only some of the bytes of a character."""
    bytes_of_sentencepiece = named(tokenizer, *BYTES[0x80:])
    return [id for id in range(len(tokenizer)) if id in bytes_of_sentencepiece or "\ufffd" in tokenizer.decode([id])]


def some_tokens(tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> list[int]:
    """Any tokens; or few different ones, over and over; or mostly bytes of characters, in the wrong order."""
    anything = range(len(tokenizer))
    parts = parts_of_characters(tokenizer)
    few = [*rng.choices(anything, k=rng.randint(0, 2)), *rng.choices(parts, k=rng.randint(1, 4))]
    return rng.choices(rng.choice([anything, few, [*parts, *few * 20]]), k=rng.randint(1, 150))


@pytest.mark.slow
def test_the_chunks_of_any_tokens_join_to_one_decode(tokenizer: PreTrainedTokenizerFast) -> None:
    rng = random.Random(1)
    for _ in range(400):
        tokens = some_tokens(tokenizer, rng)
        assert "".join(as_it_grows(tokenizer, tokens, most=rng.choice([1, 1, 4]))) == all_at_once(tokenizer, tokens)


def test_a_continuation_is_what_a_decode_of_both_adds_to_the_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = plain(tokenizer, "Hola")
    before = str(tokenizer.decode(prompt))
    assert before == "Hola"
    rng = random.Random(3)
    for _ in range(300):
        tokens = some_tokens(tokenizer, rng)
        expected = all_at_once(tokenizer, [*prompt, *tokens]).removeprefix(before)
        assert "".join(chunks_of(Text(tokenizer, prompt=prompt), tokens, rng.choice([1, 4]))) == expected


@pytest.mark.parametrize("prompt", ["Once upon a time there", "España", "😀", " "])
def test_a_text_that_continues_a_prompt_keeps_its_first_blank(tokenizer: PreTrainedTokenizerFast, prompt: str) -> None:
    (answer,) = [id for name in ("▁casa", "Ġcasa") for id in named(tokenizer, name)] or [plain(tokenizer, " a")[0]]
    text = Text(tokenizer, prompt=plain(tokenizer, prompt))
    assert text.add([answer]) + text.end() in (" casa", " a")
    text = Text(tokenizer)
    assert text.add([answer]) + text.end() in ("casa", "a")


def test_stop_sequences_cut_the_chunks_where_they_cut_one_decode(tokenizer: PreTrainedTokenizerFast) -> None:
    rng = random.Random(2)
    stopped = 0
    for _ in range(400):
        tokens = some_tokens(tokenizer, rng)
        whole = all_at_once(tokenizer, tokens)
        stops = []
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(whole) + 1)
            stops.append(whole[at : at + rng.randint(1, 6)] + rng.choice(["", "", "x"]) or "x")
        expected = all_at_once(tokenizer, tokens, stops)
        stopped += expected != whole
        assert "".join(as_it_grows(tokenizer, tokens, stops, most=rng.choice([1, 1, 4]))) == expected
    assert 40 < stopped < 400


def test_the_token_that_stops_a_text_is_the_same_in_any_lists(tokenizer: PreTrainedTokenizerFast) -> None:
    def used(most: int) -> int | None:
        """Tokens up to the one that stops the text, None where none does."""
        numbers = random.Random(0)
        text = Text(tokenizer, stops)
        at = 0
        while at < len(tokens):
            part = tokens[at : at + numbers.randint(1, most)]
            text.add(part)
            at += len(part)
            if text.stopped:
                return at - text.unused
        return None

    rng = random.Random(4)
    stopped = 0
    for _ in range(300):
        tokens = some_tokens(tokenizer, rng)
        whole = all_at_once(tokenizer, tokens)
        at = rng.randrange(len(whole) + 1)
        stops = [whole[at : at + rng.randint(1, 6)] or "x", rng.choice([whole[at : at + 2] + "x", "</s>"])]
        one_by_one = used(1)
        stopped += one_by_one is not None
        assert used(rng.choice([2, 5, 20, 200])) == one_by_one
    assert 50 < stopped < 300


def test_no_chunk_has_half_a_character(falcon: PreTrainedTokenizerFast) -> None:
    answer = "El niño 😀 dijo «漢字» ñ👩‍👩‍👧."
    tokens = plain(falcon, answer)
    assert any("\ufffd" in falcon.decode([token]) for token in tokens)
    chunks = as_it_grows(falcon, tokens)
    assert "".join(chunks) == answer
    assert not any("\ufffd" in chunk for chunk in chunks)
    assert chunks[-1] == ""  # each character is shown as soon as it is whole


def test_half_a_character_at_the_end_is_dropped(falcon: PreTrainedTokenizerFast) -> None:
    half = plain(falcon, "Hola 😀")[:-1]
    assert str(falcon.decode(half)).endswith("\ufffd")
    assert "".join(as_it_grows(falcon, half)).rstrip() == "Hola"


def test_invalid_bytes_delay_no_text(falcon: PreTrainedTokenizerFast) -> None:
    (first_byte,) = named(falcon, "Ã")  # 0xC3, as ByteLevel writes it
    assert as_it_grows(falcon, [first_byte] * 4) == ["", "\ufffd", "\ufffd", "\ufffd", ""]
    text = Text(falcon)
    assert text.add([first_byte]) == ""
    assert text.add(plain(falcon, "Hola")) == "\ufffdHola"


def test_bytes_of_sentencepiece_are_shown_when_their_run_ends() -> None:
    blanks = decoders.Replace("▁", " ")
    tokenizer = sentencepiece(decoders.Sequence([blanks, decoders.ByteFallback(), decoders.Fuse()]))
    hola, *smile = named(tokenizer, "▁Hola", *(f"<0x{byte:02X}>" for byte in "😀".encode()))
    assert as_it_grows(tokenizer, [hola, *smile, hola]) == ["Hola", "", "", "", "", "😀 Hola", ""]
    for cut in range(1, 4):
        assert as_it_grows(tokenizer, [*smile, *smile[:cut]])[-1] == "😀"


@pytest.mark.parametrize("answer", [" Madrid", "\n\n Madrid", "   \t\n", ""])
def test_leading_blanks_are_dropped(falcon: PreTrainedTokenizerFast, answer: str) -> None:
    chunks = as_it_grows(falcon, plain(falcon, answer))
    assert "".join(chunks) == answer.lstrip()
    assert "".join(as_it_grows(falcon, plain(falcon, answer + "a \n"))) == (answer + "a \n").lstrip()


def test_special_tokens_are_not_shown(falcon: PreTrainedTokenizerFast) -> None:
    end = falcon.eos_token_id
    assert "".join(as_it_grows(falcon, [end, *plain(falcon, " sí"), end, *plain(falcon, " no"), end])) == "sí no"


@pytest.mark.parametrize(
    ("answer", "stops", "shown"),
    [
        ("uno dos tres", ["dos"], "uno "),
        ("uno dos tres", ["tres", "dos"], "uno "),  # the first in the text, not in the list
        ("uno dos tres", ["os", "dos tres"], "uno "),  # the one that began first, though another is complete before
        ("uno dos otra", ["os", "dos tres"], "uno d"),  # ... and if that one is never complete, the other
        ("uno dos", ["os", "dos tres"], "uno d"),  # ... nor at the end
        ("uno dos tres", ["dos", "dos tres"], "uno "),
        ("uno dos tres", ["cuatro"], "uno dos tres"),
        ("uno dos tres", ["tres cuatro"], "uno dos tres"),
        ("aaab", ["aab"], "a"),
        ("\n\nuno\ndos", ["\n"], "uno"),  # leading blanks are no part of the text
        ("uno 😀 dos", ["😀"], "uno "),
        ("uno", ["uno"], ""),
        ("París.\n\nPregunta: ¿Y", ["\n\nPregunta:", "\nPregunta:", "Pregunta:"], "París."),
    ],
)
def test_the_text_ends_before_the_first_stop_sequence(
    falcon: PreTrainedTokenizerFast, answer: str, stops: list[str], shown: str
) -> None:
    for tokens in (plain(falcon, answer), [token for character in answer for token in plain(falcon, character)]):
        for most in (1, 2, 100):
            assert "".join(as_it_grows(falcon, tokens, stops, most)) == shown


@pytest.mark.parametrize(
    ("stops", "shown"),
    [
        (["<|endoftext|>"], "sí"),
        (["nunca", "<|endoftext|>"], "sí"),
        (["í<|endoftext|> n"], "s"),
        (["<|endoftext|> no"], "sí"),
        (["<|endoftext|>\n"], "sí no<|endoftext|> ya"),
        (["no<|endoftext|> ya"], "sí "),
        (["<|endoftext|> no", "í"], "s"),
    ],
)
def test_a_stop_sequence_may_name_special_tokens(falcon: PreTrainedTokenizerFast, stops: list[str], shown: str) -> None:
    # the second one is plain text
    tokens = plain(falcon, " sí")
    tokens += [falcon.eos_token_id, *plain(falcon, " no"), *falcon.encode("<|endoftext|>", split_special_tokens=True)]
    tokens += plain(falcon, " ya")
    for most in (1, 2, 100):
        assert "".join(as_it_grows(falcon, tokens, stops, most)) == shown


def test_the_text_before_a_special_token_that_stops_is_shown() -> None:
    blanks = decoders.Replace("▁", " ")
    tokenizer = sentencepiece(decoders.Sequence([blanks, decoders.ByteFallback(), decoders.Fuse()]))
    hola, *smile = named(tokenizer, "▁Hola", *(f"<0x{byte:02X}>" for byte in "😀".encode()))
    (end,) = named(tokenizer, "</s>")
    for most in (1, 100):
        assert "".join(as_it_grows(tokenizer, [hola, *smile, end, hola], ["</s>"], most)) == "Hola😀"
        assert "".join(as_it_grows(tokenizer, [end, hola, *smile[:2], end], ["</s>x"], most)) == "Hola"


def test_the_beginning_of_a_stop_sequence_waits_until_the_text_differs(falcon: PreTrainedTokenizerFast) -> None:
    text = Text(falcon, ["\n\nFin"])
    assert text.add(plain(falcon, "Uno.\n")) == "Uno."
    assert text.add(plain(falcon, "\n")) == ""
    assert text.add(plain(falcon, "Dos.\n\nF")) == "\n\nDos."
    assert text.end() == "\n\nF"
    assert not text.stopped


def test_nothing_comes_after_a_stop_sequence(falcon: PreTrainedTokenizerFast) -> None:
    text = Text(falcon, ["dos"])
    assert text.add(plain(falcon, "uno dos tres")) == "uno "
    assert text.stopped
    assert text.add(plain(falcon, "cuatro")) == ""
    assert text.end() == ""


def test_a_stop_sequence_that_only_the_end_decides_stops_the_text(falcon: PreTrainedTokenizerFast) -> None:
    text = Text(falcon, ["os", "dos tres"])
    assert text.add(plain(falcon, "uno dos")) == "uno "
    assert not text.stopped
    assert text.end() == "d"
    assert text.stopped


@pytest.mark.parametrize("answer", ["La casa del niño. ", "😀", "漢", "\ufffd", "    "])
def test_the_tokens_decoded_again_for_each_new_one_do_not_grow(falcon: PreTrainedTokenizerFast, answer: str) -> None:
    text = Text(falcon)
    for token in plain(falcon, answer * 300):
        text.add([token])
        assert len(text._characters._window) <= 2 * CONTEXT


def test_few_tokens_are_decoded_twice(falcon: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = _Characters._decode
    decoded = []

    def counted(characters: _Characters, tokens: list[int]) -> str:
        decoded.append(len(tokens))
        return decode(characters, tokens)

    monkeypatch.setattr(_Characters, "_decode", counted)
    tokens = plain(falcon, "La casa del niño. " * 100)
    as_it_grows(falcon, tokens)
    assert len(decoded) < 1.1 * len(tokens)


@pytest.mark.parametrize(
    ("value", "sequences"),
    [
        (None, ()),
        ("", ()),
        (",", ()),
        ("a", ("a",)),
        ("a,b", ("a", "b")),
        ("\n, b ,,c", ("\n", " b ", "c")),
        (r"\n\n,\t", ("\n\n", "\t")),
        (r"a\,b,c", ("a,b", "c")),
        (r"\\n,\\,\\\,", (r"\n", "\\", "\\,")),
        (r"\end,\d\\", (r"\end", "\\d\\")),
        ("a\\", ("a\\",)),
        ("a\\\nb", ("a\\\nb",)),
    ],
)
def test_stop_sequences_are_split_at_commas(value: str | None, sequences: tuple[str, ...]) -> None:
    assert split_stop_sequences(value) == sequences


def test_too_many_stop_sequences_are_refused() -> None:
    assert len(split_stop_sequences("a,," * MOST_STOP_SEQUENCES)) == MOST_STOP_SEQUENCES
    with pytest.raises(UserError, match=r"^stop_sequences lleva 33 textos y se admiten 32: quite algunos$"):
        split_stop_sequences("a," * (MOST_STOP_SEQUENCES + 1))
