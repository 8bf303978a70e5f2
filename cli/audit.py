"""script/audit: the known faults of the packages in .venv and in the image, which pip-audit asks a service for."""

import json
import subprocess
import sys

from cli.terminal import Parser, command
from llm.errors import UserError
from llm.weights.settings import ROOT


@command
def main() -> int:
    parser = Parser(
        prog="script/audit",
        description="Pregunta en la red por los fallos de seguridad conocidos de los paquetes de .venv y de la imagen.",
    )
    parser.parse_args()
    faults = audit(".venv", "--local")
    # and their dependencies, as pip would install them here today
    faults += audit("requirements.txt", "--requirement", "requirements.txt")
    return 1 if faults else 0


def audit(name: str, *packages: str) -> int:
    """Print the known faults of the packages that these options of pip-audit select; return how many there are.

    Raises UserError if the service does not answer.
    """
    run = subprocess.run(
        [sys.executable, "-P", "-m", "pip_audit", *packages, "--format=json", "--desc=off", "--progress-spinner=off"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if not run.stdout:
        *_, why = ["", *run.stderr.splitlines()]
        raise UserError(f"No se pudo preguntar por los paquetes de {name}: compruebe la red y repita ({why})")
    audited = json.loads(run.stdout)["dependencies"]
    known = [package for package in audited if "vulns" in package]
    if not known:
        # pip-audit itself reports no faults then
        raise UserError(f"El servicio no conoce ningún paquete de {name}, y así no se sabe nada: repita más tarde")
    faults = [(package, fault) for package in known for fault in package["vulns"]]
    for package, fault in faults:
        cure = f"corregido en {', '.join(fault['fix_versions'])}" if fault["fix_versions"] else "sin corregir"
        print(f"{name}: {package['name']} {package['version']} tiene {fault['id']}, {cure}")
    if unknown := [package["name"] for package in audited if package not in known]:
        print(f"{name}: el servicio no conoce {', '.join(unknown)}")
    print(f"{name}: {len(faults)} fallos conocidos en {len(known)} paquetes", flush=True)
    return len(faults)


if __name__ == "__main__":
    sys.exit(main())
