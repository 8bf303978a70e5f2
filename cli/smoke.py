"""script/smoke: asks the published model, or any server of it, as its users will, and says what is wrong."""

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from cli import schema, server
from cli.hosted import Reference, Refused
from cli.predict import model_environment
from cli.push import image_config
from cli.service import Answer, Cog, Hosted, Service
from cli.terminal import Loading, Parser, agree, command
from llm.errors import UserError
from llm.weights.settings import ROOT, Settings
from llm.words import decimal

RAW = "{pregunta}"
QUESTIONS: list[dict[str, Any]] = [
    {"pregunta": "What is the capital of France?", "temperature": 0, "max_tokens": 16},
    {"pregunta": "¿Cuántos días tiene una semana?", "temperature": 0, "max_tokens": 16},
    {"pregunta": "Once upon a time", "prompt_template": RAW, "temperature": 0, "max_tokens": 16},
]
DRAWN: dict[str, Any] = {"pregunta": "Once upon a time", "prompt_template": RAW, "max_tokens": 32, "seed": 7}
# the model goes on counting until max_tokens
ENDLESS: dict[str, Any] = {
    "pregunta": "1, 2, 3, 4, 5, 6, 7, 8,",
    "prompt_template": RAW,
    "temperature": 0,
    "repetition_penalty": 1,
    "max_tokens": 2000,
}
WRONG: dict[str, Any] = {**QUESTIONS[0], "temperature": 99}
COMPANY = 8
EXACT = "float32 en cpu"
"""Where the text is the same on every computer, whoever else asks. Elsewhere a token may differ."""

COST = (
    "Se harán 15 predicciones cortas en {name}. Replicate cobra los segundos que tarden (predict_time), y en "
    "un modelo privado también el arranque de la máquina y lo que espere encendida"
)


class Fault(Exception):
    """A check that failed; its message says why, in Spanish."""


@dataclass
class Smoke:
    """A service under test, and all its answers."""

    service: Service
    here: Callable[[], dict[str, str]]
    """Returns the variables of a server with the same model on this computer. Raises UserError if there can be none."""
    answers: list[Answer] = field(default_factory=list)
    greedy: list[Answer] = field(default_factory=list)
    drawn: list[Answer] = field(default_factory=list)
    together: list[Answer] = field(default_factory=list)
    first_text: float | None = None

    def record(self, answer: Answer, inputs: dict[str, Any]) -> Answer:
        """Keep the answer and return it. Raises Fault unless it is a good answer to these inputs."""
        self.answers.append(answer)
        question = f"«{inputs['pregunta']}»"
        if answer.status != "succeeded":
            raise Fault(f"{question} acabó en {answer.status}: {answer.error or 'sin decir por qué'}")
        if not answer.text.strip():
            raise Fault(f"la respuesta a {question} está vacía")
        for name in ("input_token_count", "output_token_count"):
            if not answer.metrics.get(name):
                raise Fault(f"la respuesta a {question} no trae la métrica {name}")
        if answer.metrics["output_token_count"] > inputs["max_tokens"]:
            raise Fault(f"la respuesta a {question} pasa de max_tokens={inputs['max_tokens']}")
        return answer

    def ask(self, **inputs: Any) -> Answer:
        return self.record(self.service.ask(**inputs), inputs)


# Each check returns a line for the user, and raises Fault or UserError if something is wrong.


def interface(smoke: Smoke) -> str:
    ours = set(schema.read(ROOT / "predict.py").schema["components"]["schemas"]["Input"]["properties"])
    if ours != smoke.service.inputs:
        differ = ", ".join(sorted(ours ^ smoke.service.inputs))
        raise Fault(f"no son las de predict.py, no coinciden {differ}: contesta otra versión")
    return f"las {len(ours)} de predict.py"


def questions(smoke: Smoke) -> str:
    smoke.greedy = [smoke.ask(**inputs) for inputs in QUESTIONS]
    return f"a «{QUESTIONS[0]['pregunta']}» contesta «{_shown(smoke.greedy[0].text)}»"


def streaming(smoke: Smoke) -> str:
    inputs, whole = QUESTIONS[-1], smoke.greedy[-1].text
    answer = smoke.record(smoke.service.stream(**inputs), inputs)
    if "".join(answer.pieces) != answer.text:
        raise Fault(f"llegó «{_shown(''.join(answer.pieces))}», y la respuesta es «{_shown(answer.text)}»")
    if len(answer.pieces) == 1:
        raise Fault("llegó de una vez, y no palabra a palabra")
    if answer.text != whole:
        raise Fault(f"dio «{_shown(answer.text)}», y sin emitirla, con temperatura 0, «{_shown(whole)}»")
    smoke.first_text = answer.first_text
    return f"{len(answer.pieces)} trozos, que juntos son la respuesta"


def cancelling(smoke: Smoke) -> str:
    answer = smoke.service.stream(cancel=True, **ENDLESS)
    smoke.answers.append(answer)
    if answer.status != "canceled":
        raise Fault(f"se canceló al primer trozo y acabó en {answer.status}, con {len(answer.pieces)} trozos")
    return f"trozos hasta que se paró: {len(answer.pieces)}"


def wrong_input(smoke: Smoke) -> str:
    try:
        answer = smoke.service.ask(**WRONG)
    except Refused as refusal:
        if "temperature" in str(refusal):
            return "rechaza temperature=99, y dice cuál es"
        raise Fault(f"rechaza temperature=99 sin nombrarla: {refusal}") from refusal
    smoke.answers.append(answer)
    raise Fault(f"aceptó temperature=99, que pasa del máximo, y acabó en {answer.status}")


def seed(smoke: Smoke) -> str:
    smoke.drawn = [smoke.ask(**DRAWN) for _ in range(2)]
    first, second = (answer.text for answer in smoke.drawn)
    if first != second:
        raise Fault(f"la misma dio «{_shown(first)}» y «{_shown(second)}»")
    return "dos veces el mismo texto"


def company(smoke: Smoke) -> str:
    inputs = [{**DRAWN, "seed": DRAWN["seed"] + number} for number in range(COMPANY)]
    with ThreadPoolExecutor(COMPANY) as pool:
        smoke.together = list(pool.map(lambda given: smoke.ask(**given), inputs))
    count = f"{COMPANY} respuestas"
    if not smoke.drawn:
        return count
    if smoke.drawn[0].text == smoke.together[0].text:
        return f"{count}; la de la semilla de antes, la misma"
    if smoke.service.precision == EXACT:
        raise Fault(f"con la semilla de antes dio otro texto, «{_shown(smoke.together[0].text)}»")
    return f"{count}; la de la semilla de antes, otra: fuera de {EXACT} puede pasar, y no es un fallo"


def as_here(smoke: Smoke) -> str:
    """Compare the answers with those of a server on this computer."""
    try:
        environment, loading = smoke.here(), Loading()
        with server.running(environment=environment) as running:
            with loading:
                running.wait_until_ready(loading.tick)
            return compared(smoke, Cog(running.url))
    except UserError as error:
        return f"sin comparar: {error}"


def compared(smoke: Smoke, reference: Service) -> str:
    """Raises Fault if the service's answers are not those of the same model and template at `reference`."""
    requests = [*QUESTIONS, DRAWN]
    theirs = [*smoke.greedy, *smoke.drawn[:1]]
    ours = [reference.ask(**inputs) for inputs in requests]
    pairs = list(zip(theirs, ours, strict=False))
    for inputs, answers in zip(requests, pairs, strict=False):
        remote, local = (answer.metrics.get("input_token_count") for answer in answers)
        if remote != local:
            raise Fault(f"«{inputs['pregunta']}» son {remote} tokens allí y {local} aquí: es otro modelo o plantilla")
    equal = sum(remote.text == local.text for remote, local in pairs)
    result = f"{equal} de {len(pairs)} textos iguales, de temperatura 0 y de la semilla"
    if equal == len(pairs):
        return result
    if smoke.service.precision == reference.precision == EXACT:
        raise Fault(f"{result}, y los dos calculan en {EXACT}")
    if not any(remote.text.split()[:1] == local.text.split()[:1] for remote, local in pairs):
        raise Fault(f"{result}, y ninguno empieza igual: no son los mismos pesos")
    return (
        f"{result}. No es un fallo: se separan en algún token donde se calcula de otro modo (allí, "
        f"{smoke.service.precision or 'no se sabe'}; aquí, {reference.precision})"
    )


CHECKS: list[tuple[str, Callable[[Smoke], str]]] = [
    ("entradas", interface),
    ("preguntas", questions),
    ("palabra a palabra", streaming),
    ("cancelar", cancelling),
    ("entrada mala", wrong_input),
    ("semilla", seed),
    (f"{COMPANY} a la vez", company),
    ("lo mismo que aquí", as_here),
]


def table(smoke: Smoke) -> list[tuple[str, str]]:
    """The rows of what was measured: name and value, a dash for what was not."""
    seconds, first = smoke.service.seconds_to_start, smoke.greedy[0]
    cold = first.begun - first.asked if seconds is None else seconds
    return [
        ("arranque en frío, s", decimal(cold)),
        ("primer texto, s", "-" if smoke.first_text is None else decimal(smoke.first_text)),
        ("tokens/s, una sola", _speed(smoke.drawn[:1])),
        (f"tokens/s, {COMPANY} a la vez", _speed(smoke.together)),
        ("tokens de entrada", _total(smoke.answers, "input_token_count")),
        ("tokens de salida", _total(smoke.answers, "output_token_count")),
        ("segundos de predict_time", _total(smoke.answers, "predict_time")),
    ]


def _speed(answers: Sequence[Answer]) -> str:
    tokens = sum(answer.metrics["output_token_count"] for answer in answers)
    # a short answer may begin and end in the same millisecond
    seconds = max((a.ended for a in answers), default=0) - min((a.begun for a in answers), default=0)
    return decimal(tokens / seconds) if seconds > 0 else "-"


def _total(answers: Sequence[Answer], metric: str) -> str:
    total = sum(answer.metrics.get(metric, 0) for answer in answers)
    return str(total) if isinstance(total, int) else decimal(total)


def _shown(text: str) -> str:
    """The beginning of an answer, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= 60 else f"{line[:59]}…"


@command
def main() -> int:
    parser = Parser(
        prog="script/smoke",
        description="Prueba el modelo publicado, o un servidor suyo: qué no está como debe, y qué rapidez esperar.",
        epilog="Ejemplo: script/smoke --local http://127.0.0.1:5000, con script/serve en otra terminal",
    )
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument(
        "name", nargs="?", metavar="USUARIO/NOMBRE[:VERSIÓN]", help="en Replicate; sin versión, la última"
    )
    given.add_argument("--local", metavar="DIRECCIÓN", help="un servidor de Cog, de script/serve o en un contenedor")
    parser.add_argument("--demo", action="store_true", help="lo compara con el modelo de muestra de este ordenador")
    parser.add_argument("--yes", action="store_true", help="no pregunta antes de lo que cuesta dinero")
    arguments = parser.parse_args()
    service: Service
    if arguments.local:
        service = Cog(arguments.local)
    else:
        service = Hosted(Reference.parse(arguments.name, versioned=True))
        agree(COST.format(name=service.name), yes=arguments.yes)
    run(Smoke(service, lambda: _here(arguments.demo, bool(arguments.local))))
    return 0


def _here(wants_demo: bool, local: bool) -> dict[str, str]:
    if wants_demo:
        return model_environment(True)
    # the published model is that of cog.yaml, whatever .env says
    settings = Settings.read() if local else image_config().settings
    if not settings.folder.is_dir():
        raise UserError("este ordenador no tiene los pesos: descárguelos con script/weights")
    return {}


def run(smoke: Smoke) -> None:
    """Print a line for each check, and the table. Raises UserError where something is not as it should be."""
    print(f"Se prueba {smoke.service.name}", flush=True)
    wrong = []
    for name, check in CHECKS:
        try:
            print(f"bien  {name}: {check(smoke)}", flush=True)
        except (Fault, UserError) as error:
            print(f"MAL   {name}: {' '.join(str(error).split())}", flush=True)
            wrong.append(name)
            if check is questions:
                # without an answer there is nothing to compare or to measure
                break
    if smoke.greedy:
        rows = table(smoke)
        width = max(len(name) for name, _ in rows)
        print("", *(f"{name:{width}}  {value:>8}" for name, value in rows), sep="\n")
    if wrong:
        raise UserError(f"{smoke.service.name} no está como debe: {', '.join(wrong)}")


if __name__ == "__main__":
    sys.exit(main())
