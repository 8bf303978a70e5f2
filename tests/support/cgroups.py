"""Control groups: files below a folder that stands for /, and real groups where this system allows them."""

import os
import shlex
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from llm.devices import cgroups
from llm.weights.settings import ROOT


def write_groups(root: Path, groups: str | None, mounts: str, files: dict[str, str]) -> Path:
    """groups: as in /proc/self/cgroup; mounts: as in /proc/self/mountinfo, shortened to `top point kind options`.

    groups None: a system without control groups, where none of these files is.
    """
    if groups is None:
        return root
    proc = root / "proc" / "self"
    proc.mkdir(parents=True)
    (proc / "cgroup").write_text(groups and f"{groups}\n")
    lines = []
    for mount in mounts.splitlines():
        top, point, kind, options = mount.split()
        lines.append(f"31 23 0:28 {top} {point} rw,relatime shared:9 - {kind} {kind} rw,{options}\n")
    (proc / "mountinfo").write_text("24 1 8:1 / / rw - ext4 /dev/sda1 rw\n" + "".join(lines))
    for name, content in files.items():
        path = root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    return root


@contextmanager
def real_group(controller: str, limits: dict[str, str]) -> Iterator[Path]:
    """A new group below this process's own, with the first of `limits` that this system has a file for.

    Skips the test where no group can be made.
    """
    own = next((group for group in cgroups._groups(controller, Path("/")) if group.is_dir()), None)
    if own is None:
        pytest.skip(f"no control groups for {controller} here")
    group = own / f"test-{uuid.uuid4().hex}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made below {own}: {error.strerror}")
    try:
        name = next((name for name in limits if (group / name).exists()), None)
        if name is None:
            pytest.skip(f"{own} gives its groups no limits of {controller}")
        (group / name).write_text(limits[name])
        yield group
    finally:
        with suppress(FileNotFoundError):
            group.rmdir()


def run_python(group: Path, program: str) -> str:
    """What `program` prints when it runs in the group."""
    command = f'echo $$ > {shlex.quote(str(group / "cgroup.procs"))} && exec {shlex.quote(sys.executable)} -c "$0"'
    run = subprocess.run(["sh", "-c", command, program], cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()
