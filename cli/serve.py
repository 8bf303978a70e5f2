"""script/serve: the server on this computer, without Docker, for curl, clients and load tests."""

import json
import sys

from cli import server
from cli.predict import model_environment
from cli.terminal import Loading, Parser, command, write


@command
def main() -> int:
    parser = Parser(prog="script/serve", description="Deja el modelo en marcha en este ordenador hasta Ctrl-C.")
    parser.add_argument("--port", type=int, default=5000, metavar="PUERTO", help="dónde escucha (5000)")
    parser.add_argument("--demo", action="store_true", help="con el modelo de muestra, que no necesita Hugging Face")
    arguments = parser.parse_args()
    try:
        serve(arguments.port, model_environment(arguments.demo))
    except KeyboardInterrupt:
        print("\nParado", file=sys.stderr)
    return 0


def serve(port: int, environment: dict[str, str]) -> None:
    """Show the predictor's log on stderr, and on stdout a command to try. Raises UserError when the server ends."""
    loading = Loading()
    with server.running(port=port, environment=environment, log=loading.show) as running:
        with loading:
            running.wait_until_ready(loading.tick)
        ready = f"Listo en {running.url}, hasta Ctrl-C. Pruebe en otra terminal:\n\n{curl_command(running.url)}\n\n"
        write(ready, sys.stdout)
        running.wait()


def curl_command(url: str) -> str:
    body = json.dumps({"input": {"pregunta": "What is the capital of France?", "temperature": 0}})
    headers = "-H 'Content-Type: application/json' -H 'Accept: text/event-stream'"
    # a proxy of the user's environment cannot reach this computer
    return f"curl -N --noproxy '*' {url}/predictions {headers} \\\n  -d '{body}'"


if __name__ == "__main__":
    sys.exit(main())
