"""What the READMEs and the pages of docs/ say: commands are run, tables are held against the code, files have to exist.

A command that cannot be run here stands in NOT_RUN with its reason; any other that no test runs is a failure.
"""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from cli import events, inputs, schema, serve
from llm.devices import linear
from llm.text.prompt import COMPLETION
from llm.weights import checkpoint
from llm.weights.settings import ROOT, Settings
from tests.support.client import Client
from tests.support.processes import Marked

Execute = Callable[[str], str]

SPANISH = (ROOT / "README.md").read_text(encoding="utf-8")
ENGLISH = (ROOT / "README.en.md").read_text(encoding="utf-8")
BOTH = pytest.mark.parametrize("text", [SPANISH, ENGLISH], ids=["es", "en"])
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
DOCUMENTS = ["README.md", "README.en.md", *(f"docs/{name}.md" for name in PAGES)]

ANSWER = "The capital of France is Paris."

NOT_RUN = {
    "git clone": "the address is the reader's",
    "cd falcon-cog": "the folder that git clone made",
    "docker": "there is no Docker here",
    "brew install": "it changes the machine",
    "sh <(curl": "it changes the machine",
    "cog predict": "builds with Docker",
    "cog build": "builds with Docker",
    "cog login": "asks a person for a token of Replicate's",
    "cp .env.example .env": "tests/test_settings.py",
    "script/push": "tests/test_push.py",
    "script/smoke": "tests/test_smoke.py",
    "script/deploy": "tests/test_deploy_command.py",
    "script/serve": "tests/test_script_predict.py, on a free port",
    "script/bench": "takes minutes",
    "script/test": "it is what runs this",
    "cog playground": "the command cog is not here",
    ".venv/bin/python examples/": "tests/test_examples.py",
}


def blocks(text: str, language: str) -> list[str]:
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(content) for _, content in found]


def commands(text: str) -> list[str]:
    return [line for block in blocks(text, "bash") for line in re.split(r"(?<!\\)\n", block) if line]


def not_run(command: str) -> list[str]:
    return [start for start in NOT_RUN if command.startswith(start)]


def table(text: str, header: str) -> list[list[str]]:
    """The rows of the table whose first line begins with `header`."""
    _, _, rest = text.partition(f"\n{header}")
    rows = rest.partition("\n\n")[0].splitlines()[2:]
    assert rows, header
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def unmarked(cell: str) -> str:
    return cell.strip("`")


# Commands


@pytest.fixture
def environment(demo_folder: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "WEIGHTS_DIR": str(demo_folder.parent),
        # nobody listens there
        "HF_ENDPOINT": "http://127.0.0.1:1",
    }


@pytest.fixture
def execute(environment: dict[str, str], tmp_path: Path) -> Execute:
    def run(command: str) -> str:
        """All that the command prints. It has to end well."""
        result = subprocess.run(
            ["bash", "-c", command],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert result.returncode == 0, result.stdout
        return result.stdout

    return run


def python(command: str) -> str:
    """A command script/NAME as cli/run runs it, with this Python, whether there is a .venv or not."""
    script, _, arguments = command.partition(" ")
    text = (ROOT / script).read_text()
    (name,) = re.findall(r'/cli/run" (\w+) "\$@"\n$', text)
    assert script == f"script/{name}"
    return f"{shlex.quote(sys.executable)} -P -m cli.{name} {arguments}"


def test_every_command_is_run_or_listed() -> None:
    tested = ("script/predict ", "script/weights", "curl -N ")
    every = [command for text in (SPANISH, ENGLISH, *PAGES.values()) for command in commands(text)]
    for command in every:
        assert command.startswith(tested) + len(not_run(command)) == 1, command
    assert not [start for start in NOT_RUN if not any(start in not_run(command) for command in every)]


def test_both_have_the_same_commands_and_programs() -> None:
    for language in ("bash", "python"):
        assert blocks(SPANISH, language) == blocks(ENGLISH, language)


@pytest.mark.slow
def test_the_demo_prints_what_is_shown(
    execute: Execute, environment: dict[str, str], demo_folder: Path, processes: Marked
) -> None:
    (command,) = (command for command in commands(SPANISH) if command.startswith("script/predict --demo"))
    # another model's revision, which the demo must not look for
    environment |= {"MODEL_REVISION": "a" * 40, **processes.environment}
    printed = execute(python(command)).replace(checkpoint.shown(demo_folder), "weights/smollm2-135m-instruct")
    for text in (SPANISH, ENGLISH):
        shown = blocks(text, "text")[0]
        assert f"\n{ANSWER}\n" in shown
        _, start, loading = shown.partition("Cargando el modelo\n")
        assert comparable(start + loading) == comparable(printed)
    assert not processes.alive()


def comparable(output: str) -> list[str]:
    """Its lines without what is another machine's: numbers, types, and how the weights are laid out."""
    own = [line for line in output.splitlines() if not re.match("Cargado en|Pesos ordenados|.*grafos CUDA", line)]
    types = "(bfloat16|float16|float32)(, con las cuentas en float32)?"
    return [re.sub(r"\d+(,\d+)?", "#", re.sub(types, "#", line)) for line in own]


def test_the_first_run_says_what_is_shown() -> None:
    shown, _, _ = blocks(SPANISH, "text")[0].partition("Cargando el modelo\n")
    # of two fields and a comma any line is made
    texts = [said for said in what_the_code_says() if len(re.sub(r"\W", "", said)) >= len("Listo")]
    patterns = [re.escape(said).replace("…", ".+") for said in texts]
    for line in shown.splitlines():
        assert any(re.fullmatch(pattern, line) for pattern in patterns), line


@pytest.mark.parametrize(
    "command",
    sorted({c for c in commands(SPANISH) + commands(PAGES["plantillas"]) if c.startswith("script/predict -i")}),
)
def test_a_question_to_falcon(falcon_server: Client, command: str) -> None:
    words = shlex.split(command)
    assert set(words[1::2]) == {"-i"}
    values = inputs.from_pairs(words[2::2], schema.read(ROOT / "predict.py").schema)
    assert falcon_server.predict(**values, max_tokens=4).json()["status"] == "succeeded"


@pytest.mark.slow
def test_the_local_server_answers_curl(execute: Execute, demo_server: Client) -> None:
    (serve,) = (command for command in commands(SPANISH) if command.startswith("script/serve"))
    (curl,) = (command for command in commands(SPANISH) if command.startswith("curl -N"))
    address = f"http://127.0.0.1:{serve.split()[-1]}"
    assert address in curl
    # nobody listens at that proxy
    command = f"http_proxy=http://127.0.0.1:1 {curl.replace(address, demo_server.server.url)}"
    # curl writes its progress to the standard error
    answer = execute(f"{command} 2>/dev/null")
    streamed = list(events.read([answer.encode()]))
    assert streamed[-1][1]["status"] == "succeeded"
    assert "".join(data["chunk"] for name, data in streamed if name == "output") == ANSWER


@pytest.mark.parametrize("path", ["README.md", "README.en.md", "deploy/README.md"])
def test_the_curl_shown_is_the_one_that_serve_prints(path: str) -> None:
    assert serve.curl_command("http://127.0.0.1:5000") in commands((ROOT / path).read_text(encoding="utf-8"))


@pytest.mark.slow
def test_cog_predict_prints_the_pieces(demo_server: Client) -> None:
    """As its source says: the prediction's output, as JSON with two blanks for each level. A piece has one token or
    more, as they come."""
    (shown,) = blocks(PAGES["cog"], "json")
    output = demo_server.predict(pregunta="What is the capital of France?", temperature=0).json()["output"]
    assert json.dumps(json.loads(shown), indent=2, ensure_ascii=False) + "\n" == shown
    assert "".join(json.loads(shown)) == "".join(output) == ANSWER


@pytest.mark.slow
def test_32_clients_at_once_get_the_texts_that_each_gets_alone(demo_server: Client) -> None:
    if not linear.layout(chosen=None):
        pytest.skip("this processor has no layout of its own")
    if "puede cambiar" in demo_server.get("/health-check")["setup"]["logs"]:
        pytest.skip("this processor has no numbers of rows that agree, and setup says so")

    def text(number: int) -> str:
        inputs = {"pregunta": f"What is {number} and {number}?" * (1 + number % 3), "seed": number, "max_tokens": 6}
        prediction = demo_server.predict(temperature=number % 2, **inputs).json()
        assert prediction["status"] == "succeeded", prediction
        return "".join(prediction["output"])

    # greedy and drawn, of each length
    some = range(0, 32, 5)
    alone = [text(number) for number in some]
    with ThreadPoolExecutor(32) as clients:
        together = list(clients.map(text, range(32)))
    assert [together[number] for number in some] == alone


@pytest.mark.slow
def test_weights_without_a_network(environment: dict[str, str], tmp_path: Path) -> None:
    variables = environment | {"WEIGHTS_DIR": str(tmp_path), "MODEL_ID": "org/nombre", "MODEL_REVISION": ""}
    result = subprocess.run(["bash", "-c", python("script/weights")], env=variables, capture_output=True, text=True)
    assert result.returncode == 1
    message = next(unmarked(row[0]) for row in table(PAGES["errores"], "| mensaje |") if "Sin conexión" in row[0])
    assert re.search(re.escape(message).replace("…", ".+"), result.stderr)
    assert not list(tmp_path.glob("*"))


def test_the_program_is_the_example() -> None:
    """tests/test_examples.py runs it."""
    (program,) = blocks(SPANISH, "python")
    assert program == (ROOT / "examples" / "answer.py").read_text(encoding="utf-8")


# What the code says


@BOTH
def test_the_inputs_are_those_of_predict_py(text: str) -> None:
    spanish = text == SPANISH
    types = dict(zip(("string", "integer", "number"), ("texto", "entero", "número"), strict=True))
    if not spanish:
        types = dict(zip(types, ("text", "integer", "number"), strict=True))
    rows = table(text, "| entrada |" if spanish else "| input |")
    part = schema.read(ROOT / "predict.py").schema["components"]["schemas"]["Input"]
    properties = part["properties"]
    assert [unmarked(row[0]) for row in rows] == sorted(properties, key=lambda name: properties[name]["x-order"])
    to, characters = ("a", "caracteres") if spanish else ("to", "characters")
    for name, kind, default, limits, meaning in rows:
        wanted = properties[unmarked(name)]
        assert kind == types[wanted["type"]]
        if wanted.get("default") is not None:
            assert default == f"{wanted['default']:g}"
        elif unmarked(name) in part["required"]:
            assert default in ("obligatoria", "required")
        else:
            assert default and not any(character.isdigit() for character in default)
        if "maxLength" in wanted:
            assert limits == f"{wanted.get('minLength', 0)} {to} {wanted['maxLength']} {characters}"
        elif "maximum" in wanted:
            assert limits == f"{wanted['minimum']:g} {to} {wanted['maximum']:g}"
        else:
            assert limits == ""
        assert meaning == wanted["description"] or not spanish


def test_the_metrics_are_a_predictions(falcon_server: Client) -> None:
    answer = falcon_server.predict(pregunta="Hi", max_tokens=1).json()
    # predict_time is Cog's own
    metrics = answer["metrics"].keys() - {"predict_time"}
    for rows in (table(SPANISH, "| métrica |"), table(ENGLISH, "| metric |")):
        assert set(re.findall(r"`(\w+)`", " ".join(row[0] for row in rows))) == metrics


def test_the_prompt_is_the_one_shown() -> None:
    assert f"{COMPLETION}\n" in blocks(PAGES["plantillas"], "text")


@BOTH
def test_another_model_is_one_and_the_same(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ.keys() & {"MODEL_ID", "WEIGHTS_DIR"}:
        monkeypatch.delenv(name)
    rows = table(text, "| archivo | línea |" if text == SPANISH else "| file | line |")
    local, image, unignored = (unmarked(row[1]) for row in rows)
    (tmp_path / ".env").write_text(local)
    settings = Settings.read(tmp_path)
    assert yaml.safe_load(image) == [f"MODEL_ID={settings.model_id}"]
    assert unignored == f"!{settings.folder.relative_to(tmp_path)}"
    *_, last = (ROOT / ".dockerignore").read_text().splitlines()
    assert last.startswith("!weights/")


def test_each_message_is_one_of_the_code() -> None:
    said = what_the_code_says()
    for message, cure in table(PAGES["errores"], "| mensaje |"):
        text = unmarked(message).replace("{pregunta}", "…")
        assert any(text in line for line in said), message
        assert cure


def what_the_code_says() -> list[str]:
    """Every text in the commands' code, with … for what is filled in."""
    said = []
    for path in (ROOT / "predict.py", *(ROOT / "llm").rglob("*.py"), *(ROOT / "cli").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                said.append("".join(str(p.value) if isinstance(p, ast.Constant) else "…" for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                said.append(node.value)
    setup = (ROOT / "script" / "setup").read_text(encoding="utf-8")
    return said + re.findall(r'"([^"\n]+)"', re.sub(r"\$(\([^()]*\)|\{[^{}]*\}|\w+)", "…", setup))


def test_the_packages_are_the_images() -> None:
    pins = re.findall(r"^(\w[\w-]*)==", (ROOT / "requirements.in").read_text(), re.MULTILINE)
    assert [unmarked(row[0]) for row in table(PAGES["cog"], "| paquete |")] == pins


def test_the_list_of_commands_is_whole() -> None:
    (row,) = (row for row in table(SPANISH, "| dónde |") if "(script)" in row[0])
    assert set(re.findall(r"`(\w+)`", row[1])) == {path.name for path in (ROOT / "script").iterdir()}


@pytest.mark.parametrize("path", [*DOCUMENTS, "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"])
def test_what_is_linked_or_named_is_there(path: str) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    prose = re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)]+)\)", prose):
        if link.startswith("https://"):
            continue
        name, _, section = link.partition("#")
        target = (ROOT / path).parent / name if name else ROOT / path
        assert target.exists(), link
        assert not section or section in sections(target.read_text(encoding="utf-8")), link
    named = re.findall(
        r"`((?:script|llm|cli|tests)/\w[\w.]*|predict\.py|cog\.yaml|\.dockerignore|requirements[\w-]*\.txt)", prose
    )
    assert all((ROOT / name).exists() for name in named), named


def sections(text: str) -> set[str]:
    """The headings as GitHub names them in addresses."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_each_page_is_linked(name: str) -> None:
    assert f"](docs/{name}.md" in SPANISH
