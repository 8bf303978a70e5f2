"""script/weights: bring the model into weights/NAME/, or verify the one that is there."""

import os
import sys

from llm import weights
from llm.settings import Settings
from local import demo
from local.terminal import Parser, command


@command
def main() -> int:
    parser = Parser(
        prog="script/weights", description="Trae el modelo de MODEL_ID a weights/, o comprueba el que ya está."
    )
    parser.add_argument("--demo", action="store_true", help="el modelo de muestra, que no necesita Hugging Face")
    arguments = parser.parse_args()
    try:
        settings = Settings.read()
        if arguments.demo:
            settings = demo.ensure(settings)
        there = os.path.lexists(settings.folder)
        model = weights.ensure(settings, thorough=True)
    except KeyboardInterrupt:
        print("\nInterrumpido: repita script/weights para terminar", file=sys.stderr)
        return 130
    if there:
        checked = "comprobado" if model.verified else f"no se comprueba, porque no tiene {weights.MANIFEST}"
        print(f"{model.origin}: {checked}; no hay nada que hacer")
    return 0


if __name__ == "__main__":
    sys.exit(main())
