"""Whatever is sent to the real server is answered with a final status, and never with a 5xx."""

import json
from collections import Counter
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode
from transformers import PreTrainedTokenizerFast

from cli import server
from llm.text.detokenizer import Text, split_stop_sequences
from llm.text.prompt import COMPLETION
from tests.support import checkpoints
from tests.support.client import GREEDY, Client

EXAMPLES = settings(
    max_examples=40,
    # the same examples each time
    derandomize=True,
    database=None,
    deadline=None,
    # the server is the same for all
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
FEW = 3
"""Tokens of an answer whose text does not matter."""
PLAIN = "{pregunta}"

Inputs = dict[str, Any]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return checkpoints.tokenizer()


def ended(answer: httpx.Response) -> dict[str, Any]:
    """The prediction, which has succeeded, or failed with one line of ours."""
    assert answer.status_code == httpx.codes.OK, answer.text[:500]
    prediction: dict[str, Any] = answer.json()
    if prediction["status"] != "succeeded":
        assert prediction["status"] == "failed"
        line = server.error_text(prediction["error"])
        assert line != prediction["error"], "nobody foresaw it"
        assert "\n" not in line
    return prediction


def succeeded(client: Client, **inputs: Any) -> dict[str, Any]:
    prediction = ended(client.predict(**{"max_tokens": FEW, **inputs}))
    assert prediction["status"] == "succeeded", prediction["error"]
    return prediction


def text_of(prediction: dict[str, Any]) -> str:
    return "".join(prediction["output"])


def text_before(text: str, stops: str) -> str:
    return text[: min(at for stop in stops.split(",") if stop and (at := text.find(stop)) >= 0)]


# Values that the schema allows, less those that would only take long.
TEXTS = st.text(max_size=40) | st.text("{}%s!r0 ,\n<|>👩\u200d\0", max_size=40)
WHOLE = st.integers(-(2**70), 2**70)
VALID = {
    "max_tokens": st.integers(1, FEW),
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0, 1),
    "top_k": st.integers(0, 1000),
    "repetition_penalty": st.floats(1, 2),
    "stop_sequences": TEXTS,
    "seed": WHOLE.filter(lambda seed: seed != -1),
    "prompt_template": st.one_of(TEXTS, st.tuples(TEXTS, TEXTS).map(PLAIN.join)),
}
QUESTION = {"pregunta": TEXTS.filter(bool)}
# Values that the schema forbids.
NO_TEXT = st.one_of(st.none(), st.booleans(), WHOLE, st.lists(TEXTS, max_size=2), st.dictionaries(TEXTS, WHOLE))
NO_NUMBER = st.one_of(st.none(), st.booleans(), TEXTS, st.lists(WHOLE, max_size=2), st.dictionaries(TEXTS, WHOLE))
NO_WHOLE = NO_NUMBER | st.floats(allow_nan=False, allow_infinity=False).filter(lambda number: number % 1)


def outside(least: float, most: float) -> st.SearchStrategy[float]:
    below = st.floats(max_value=least, exclude_max=True, allow_infinity=False)
    return below | st.floats(min_value=most, exclude_min=True, allow_infinity=False)


INVALID = {
    "pregunta": NO_TEXT | st.just(""),
    "max_tokens": NO_WHOLE | st.integers(max_value=0) | st.integers(min_value=2049),
    "temperature": NO_NUMBER | outside(0, 2),
    "top_p": NO_NUMBER | outside(0, 1),
    "top_k": NO_WHOLE | st.integers(max_value=-1) | st.integers(min_value=1001),
    "repetition_penalty": NO_NUMBER | outside(1, 2),
    "stop_sequences": NO_TEXT | st.just("a" * 1001),
    "seed": NO_WHOLE,
    "prompt_template": NO_TEXT,
}
JSON = st.recursive(
    st.none() | st.booleans() | WHOLE | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
)


@pytest.mark.slow
@EXAMPLES
@given(inputs=st.fixed_dictionaries(QUESTION, optional=VALID))
def test_allowed_inputs_give_the_same_text_whole_and_as_a_stream(falcon_server: Client, inputs: Inputs) -> None:
    inputs = {"max_tokens": FEW, "seed": 1, **inputs}
    whole = ended(falcon_server.predict(**inputs))
    with falcon_server.stream(**inputs) as events:
        streamed = list(events)
    assert (streamed[-1][0], streamed[-1][1]["status"]) == ("completed", whole["status"])
    if whole["status"] == "succeeded":
        text = text_of(whole)
        assert text == "".join(data["chunk"] for name, data in streamed if name == "output")
        assert whole["metrics"]["output_token_count"] <= inputs["max_tokens"]
        assert not any(stop in text for stop in split_stop_sequences(inputs.get("stop_sequences")))


@EXAMPLES
@given(data=st.data())
def test_a_forbidden_value_is_422_with_its_field(falcon_server: Client, data: st.DataObject) -> None:
    field = data.draw(st.sampled_from(sorted(INVALID)))
    answer = falcon_server.predict(**{"pregunta": "a", field: data.draw(INVALID[field])})
    assert answer.status_code == httpx.codes.UNPROCESSABLE_ENTITY
    assert [detail["loc"] for detail in answer.json()["detail"]] == [["body", "input", field]]


@EXAMPLES
@given(body=st.binary(max_size=40) | JSON.map(json.dumps) | JSON.map(lambda value: json.dumps({"input": value})))
def test_any_other_body_is_refused(falcon_server: Client, body: str | bytes) -> None:
    answer = falcon_server.post("/predictions", body)
    assert answer.status_code in (httpx.codes.BAD_REQUEST, httpx.codes.UNPROCESSABLE_ENTITY)


@pytest.mark.slow
@pytest.mark.parametrize("mode", GenerationMode)
def test_requests_made_from_openapi_json_get_no_5xx(
    falcon_server: Client, mode: GenerationMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", server.HOST)
    document = falcon_server.get("/openapi.json")
    body = document["components"]["schemas"]["PredictionRequest"]
    # Cog makes a folder of this name, and where it cannot (over 255 bytes, a NUL) the place is lost until a restart.
    del body["properties"]["id"]
    # else most requests have no input
    body["required"] = ["input"]
    statuses: Counter[int] = Counter()
    schema = schemathesis.openapi.from_dict(document)
    operations = [schema[path][method] for path, methods in document["paths"].items() for method in methods]

    def call(case: Case[Any]) -> None:
        inputs = case.body.get("input") if isinstance(case.body, dict) else None
        if isinstance(inputs, dict) and mode is GenerationMode.POSITIVE:
            inputs["max_tokens"] = FEW
        answer = case.call(base_url=falcon_server.server.url, timeout=60)
        statuses[answer.status_code] += 1
        assert answer.status_code < httpx.codes.INTERNAL_SERVER_ERROR
        if case.path == "/predictions" and answer.status_code == httpx.codes.OK:
            assert answer.json()["status"] in ("succeeded", "failed")

    for operation in operations:
        # the other operations take no input that could be wrong
        if mode is GenerationMode.POSITIVE or operation.path == "/predictions":
            EXAMPLES(given(case=operation.as_strategy(generation_mode=mode))(call))()
    assert statuses[200 if mode is GenerationMode.POSITIVE else 422] > EXAMPLES.max_examples / 3
    assert falcon_server.get("/health-check")["status"] == "READY"


ODD_QUESTIONS = [
    "nulo \0 y \ufffd",
    "שלום עולם, مرحبا \u202e\u2067 de derecha a izquierda",
    "e\u0301 n\u0303 Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢ " + "\u0301" * 500,
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇪🇸 \u200d\ufe0f",
    "\u0085\u00a0\u2003\u3000\ufeff\t\r\n",
    " ",
    "{0} {pregunta!r} {pregunta.__class__} {} %s %(pregunta)s ${pregunta} $1 \\1 \\n {{}} {{pregunta}} {% raw %}",
    "-" * 100_000,
]


@pytest.mark.parametrize("pregunta", ODD_QUESTIONS, ids=range(len(ODD_QUESTIONS)))
def test_an_odd_question_is_read_as_it_is_written(
    falcon_server: Client, tokenizer: PreTrainedTokenizerFast, pregunta: str
) -> None:
    for template in (PLAIN, f"{{0}} {{pregunta!r}} %s %(pregunta)s {{{{}}}} {PLAIN}", COMPLETION):
        given_template = {} if template is COMPLETION else {"prompt_template": template}
        count = succeeded(falcon_server, pregunta=pregunta, **given_template)["metrics"]["input_token_count"]
        assert count == len(tokenizer(template.replace(PLAIN, pregunta))["input_ids"])


def test_half_a_surrogate_pair_is_400(falcon_server: Client) -> None:
    for field in ("pregunta", "prompt_template", "stop_sequences", "otra"):
        for half in ("\\ud83d", "\\ude00", "\\ude00\\ud83d"):
            body = f'{{"input": {{"pregunta": "a", "{field}": "{half}{{pregunta}}"}}}}'
            assert falcon_server.post("/predictions", body).status_code == httpx.codes.BAD_REQUEST
    body = '{"input": {"pregunta": "\\ud83d\\ude00", "max_tokens": 1, "prompt_template": "{pregunta}"}}'
    assert ended(falcon_server.post("/predictions", body))["metrics"]["input_token_count"] == 2


def test_a_limit_is_taken_and_a_value_beyond_it_is_422(falcon_server: Client) -> None:
    inputs = falcon_server.get("/openapi.json")["components"]["schemas"]["Input"]["properties"]
    limited = {name: rules for name, rules in inputs.items() if "minimum" in rules}
    assert limited.keys() == {"max_tokens", "temperature", "top_p", "top_k", "repetition_penalty"}
    for name, rules in limited.items():
        for limit, way in ((rules["minimum"], -1), (rules["maximum"], 1)):
            # so long a prompt that the answer ends soon
            prediction = succeeded(falcon_server, **{"pregunta": " a" * 2044, "prompt_template": PLAIN, name: limit})
            assert prediction["metrics"]["output_token_count"] <= 4
            beyond = limit + way * (1 if rules["type"] == "integer" else 1e-6)
            refused = falcon_server.predict(**{"pregunta": "a", name: beyond})
            assert refused.status_code == httpx.codes.UNPROCESSABLE_ENTITY, (name, beyond)


@pytest.mark.parametrize("seed", [0, -2, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), 2**64, 10**400 // 10**100, 1e300])
def test_any_seed_gives_the_same_text_again(falcon_server: Client, seed: float) -> None:
    inputs = {"pregunta": "a", "seed": seed, "temperature": 2}
    assert text_of(succeeded(falcon_server, **inputs)) == text_of(succeeded(falcon_server, **inputs))


@pytest.mark.parametrize("drawn", [{}, {"seed": -1}, {"seed": -1.0}])
def test_a_drawn_seed_differs_each_time_and_gives_its_text_again(
    falcon_server: Client, drawn: dict[str, float]
) -> None:
    inputs = {"pregunta": "a", "temperature": 2, "max_tokens": 1}
    predictions = [succeeded(falcon_server, **inputs, **drawn) for _ in range(12)]
    seeds = [int(prediction["logs"].partition("semilla ")[2].partition(":")[0]) for prediction in predictions]
    assert len({*seeds}) == len(seeds)
    # the command cog takes no larger seed
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert text_of(succeeded(falcon_server, **inputs, seed=seeds[0])) == text_of(predictions[0])


@pytest.fixture(scope="module")
def greedy(falcon_server: Client) -> list[str]:
    """An answer in pieces of four characters, for the tests of stop sequences."""
    text = text_of(succeeded(falcon_server, pregunta="Once upon a time", **{**GREEDY, "max_tokens": 24}))
    return [text[at : at + 4] for at in range(0, len(text), 4)]


def test_a_stop_sequence_ends_the_answer(falcon_server: Client, greedy: list[str]) -> None:
    text = "".join(greedy)
    at = text.index(greedy[9])
    across = greedy[7][-1] + greedy[8] + greedy[9][0]
    overlapping = f"{across[:-1]},{across[1:]},{across}"
    blank = next(character for character in text if character.isspace())
    for stops in (greedy[9], across, overlapping, blank, f",{blank},,{blank * 3},", text[0], f"{text},nunca"):
        prediction = succeeded(
            falcon_server, pregunta="Once upon a time", stop_sequences=stops, **{**GREEDY, "max_tokens": 24}
        )
        assert text_of(prediction) == text_before(text, stops)
        assert prediction["metrics"]["finish_reason"] == "stop"
    assert 0 < at < len(text)


@pytest.mark.parametrize("stops", ["", ",", ",,,", "nunca", "\ufffe", "👩‍👩‍👧", "\0"])
def test_stop_sequences_without_a_match_change_nothing(falcon_server: Client, greedy: list[str], stops: str) -> None:
    prediction = succeeded(
        falcon_server, pregunta="Once upon a time", stop_sequences=stops, **{**GREEDY, "max_tokens": 24}
    )
    assert text_of(prediction) == "".join(greedy)
    assert (prediction["metrics"]["finish_reason"], prediction["metrics"]["output_token_count"]) == ("length", 24)


@pytest.mark.parametrize(
    ("stop", "shown"),
    [
        ("👩", "uno "),
        ("\u200d", "uno 👩"),
        ("👧", "uno 👩\u200d👩\u200d"),
        # halves of 👩 in UTF-16, and of any emoji in UTF-8: no text has them
        ("\ud83d", "uno 👩\u200d👩\u200d👧 dos"),
        ("\ufffd", "uno 👩\u200d👩\u200d👧 dos"),
    ],
)
def test_a_stop_sequence_may_be_a_part_of_an_emoji(tokenizer: PreTrainedTokenizerFast, stop: str, shown: str) -> None:
    text = Text(tokenizer, [stop])
    chunks = [text.add([token]) for token in tokenizer.encode("uno 👩‍👩‍👧 dos")]
    assert "".join([*chunks, text.end()]) == shown


@pytest.mark.parametrize(
    "nested", ["[" * 200_000 + "]" * 200_000, '{"a":' * 100_000 + "1" + "}" * 100_000, "[" * 10**6]
)
def test_deep_json_is_refused(falcon_server: Client, nested: str) -> None:
    for body in (nested, f'{{"input": {nested}}}', f'{{"input": {{"pregunta": "a", "otra": {nested}}}}}'):
        answer = falcon_server.post("/predictions", body)
        assert answer.status_code in (httpx.codes.BAD_REQUEST, httpx.codes.UNPROCESSABLE_ENTITY)


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("application/json; charset=utf-8", httpx.codes.OK),
        ("APPLICATION/JSON", httpx.codes.OK),
        ("text/plain", httpx.codes.UNSUPPORTED_MEDIA_TYPE),
        ("application/x-www-form-urlencoded", httpx.codes.UNSUPPORTED_MEDIA_TYPE),
        ("multipart/form-data; boundary=x", httpx.codes.UNSUPPORTED_MEDIA_TYPE),
        ("application/jsonx", httpx.codes.UNSUPPORTED_MEDIA_TYPE),
        ("nada", httpx.codes.UNSUPPORTED_MEDIA_TYPE),
        ("", httpx.codes.UNSUPPORTED_MEDIA_TYPE),
        # Cog takes this for an empty body
        (None, httpx.codes.UNPROCESSABLE_ENTITY),
    ],
)
def test_the_content_type_has_to_be_json(falcon_server: Client, content_type: str | None, status: int) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    body = json.dumps({"input": {"pregunta": "a", "max_tokens": 1}})
    url = f"{falcon_server.server.url}/predictions"
    assert httpx.post(url, content=body, headers=headers, trust_env=False).status_code == status


@pytest.mark.slow
def test_a_body_of_50_mb_is_answered(falcon_server: Client) -> None:
    much = "a" * 50_000_000
    assert falcon_server.predict(pregunta=much).status_code == httpx.codes.UNPROCESSABLE_ENTITY
    assert falcon_server.post("/predictions", much).status_code == httpx.codes.BAD_REQUEST
    succeeded(falcon_server, pregunta="a", otra=much)
    assert falcon_server.post("/predictions", much * 3).status_code == httpx.codes.REQUEST_ENTITY_TOO_LARGE
