"""A copy of the project, as its user has it once it is set up."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from llm.weights.settings import ROOT


def copied(folder: Path) -> Path:
    """Copy the project, without the developer's .env and with a .venv that runs this Python."""
    for name in ("llm", "cli", "script", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        # in a worktree .git is a file
        if path.is_file() and path.name not in (".env", ".git"):
            shutil.copy(path, folder)
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    pins = (folder / "requirements-dev.txt").read_bytes()
    checksum = subprocess.run(["cksum"], input=pins, capture_output=True, check=True).stdout.decode().strip()
    (folder / ".venv" / "ready").write_text(f"{checksum}\n")
    return folder
