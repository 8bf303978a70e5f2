"""script/weights: bring the model into weights/NAME/, or verify the one that is there."""

import os
import sys

from cli import demo
from cli.terminal import Parser, command
from llm.weights import checkpoint, hub
from llm.weights.settings import Settings


@command
def main() -> int:
    parser = Parser(
        prog="script/weights", description="Descarga el modelo de MODEL_ID en weights/, o comprueba el que ya está."
    )
    parser.add_argument("--demo", action="store_true", help="el modelo de muestra, que no necesita Hugging Face")
    arguments = parser.parse_args()
    try:
        settings = Settings.read()
        if arguments.demo:
            settings = demo.ensure(settings)
        exists = os.path.lexists(settings.folder)
        model = hub.ensure(settings, print, thorough=True)
    except KeyboardInterrupt:
        print("\nInterrumpido: repita script/weights para terminar", file=sys.stderr)
        return 130
    if exists:
        checked = "comprobado" if model.verified else f"no se comprueba, porque no tiene {checkpoint.MANIFEST}"
        print(f"{model.origin}: {checked}; no hay nada que hacer")
    return 0


if __name__ == "__main__":
    sys.exit(main())
