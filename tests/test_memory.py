"""How much memory the process may take: the machine's, its control groups' and its own limits, whichever is least."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llm.devices import cgroups, memory
from llm.weights.settings import ROOT
from tests.support import checkpoints
from tests.support.cgroups import real_group, run_python, write_groups

GIB = 1 << 30
V1 = "/ /sys/fs/cgroup/memory cgroup memory"
V2 = "/ /sys/fs/cgroup cgroup2 nsdelegate"
NO_LIMIT = "9223372036854771712"


def v1(folder: str, limit: str, used: int, cached: int = 0) -> dict[str, str]:
    return {
        f"{folder}/memory.limit_in_bytes": limit,
        f"{folder}/memory.usage_in_bytes": str(used),
        # version 1 counts the group alone, and (total_) with the groups below it
        f"{folder}/memory.stat": f"cache 7\ninactive_file 5\ntotal_inactive_file {cached}\ntotal_active_file 9",
    }


def v2(folder: str, limit: str, used: int, cached: int = 0, high: str = "max") -> dict[str, str]:
    return {
        f"{folder}/memory.max": limit,
        f"{folder}/memory.high": high,
        f"{folder}/memory.current": str(used),
        f"{folder}/memory.stat": f"anon 3\nfile 8\ninactive_file {cached}\nactive_file 9",
    }


@pytest.mark.parametrize(
    ("groups", "mounts", "files", "left"),
    [
        # a container sees its own group as the root
        ("0::/", V2, v2("/sys/fs/cgroup", str(8 * GIB), 3 * GIB, GIB), 6 * GIB),
        ("0::/", V2, v2("/sys/fs/cgroup", "max", 3 * GIB, GIB), math.inf),
        ("0::/", V2, v2("/sys/fs/cgroup", str(8 * GIB), 3 * GIB, high=str(5 * GIB)), 2 * GIB),
        # the limit was lowered below the use
        ("0::/", V2, v2("/sys/fs/cgroup", str(GIB), 3 * GIB), -2 * GIB),
        # the least of all groups above, each with its own use
        (
            "0::/a/b/c",
            V2,
            v2("/sys/fs/cgroup/a/b/c", "max", GIB)
            | v2("/sys/fs/cgroup/a/b", str(4 * GIB), GIB)
            | v2("/sys/fs/cgroup/a", str(5 * GIB), 4 * GIB)
            | {"/sys/fs/cgroup/cgroup.procs": "1"},
            GIB,
        ),
        # a neighbouring group does not count
        ("0::/a", V2, v2("/sys/fs/cgroup/a", str(4 * GIB), 0) | v2("/sys/fs/cgroup/b", "1", 0), 4 * GIB),
        ("5:memory:/docker/x", V1, v1("/sys/fs/cgroup/memory/docker/x", str(8 * GIB), GIB, GIB // 2), 7.5 * GIB),
        # Docker, without a namespace for the container
        (
            "5:memory:/docker/x",
            "/docker/x /sys/fs/cgroup/memory cgroup memory",
            v1("/sys/fs/cgroup/memory", str(8 * GIB), GIB),
            7 * GIB,
        ),
        # a namespace whose root is another group
        (
            "5:memory:/kubelet/x",
            "/docker/y/kubelet/x /sys/fs/cgroup/memory cgroup memory",
            v1("/sys/fs/cgroup/memory", str(8 * GIB), GIB),
            7 * GIB,
        ),
        ("0::/../b", V2, v2("/sys/fs/cgroup", str(8 * GIB), GIB), 7 * GIB),
        # both versions, and controllers that share a hierarchy
        (
            "7:hugetlb,memory:/x\n3:cpu:/y\n0::/z",
            "/ /sys/fs/cgroup/hugetlb,memory cgroup hugetlb,memory\n/ /sys/fs/cgroup/unified cgroup2 rw\n"
            "/ /sys/fs/cgroup/cpu cgroup cpu",
            v1("/sys/fs/cgroup/hugetlb,memory/x", str(2 * GIB), GIB) | v1("/sys/fs/cgroup/cpu/x", "1", 0),
            GIB,
        ),
        # files that a kernel or a sandbox may lack
        ("0::/", V2, {"/sys/fs/cgroup/memory.max": str(GIB), "/sys/fs/cgroup/memory.current": "24"}, GIB - 24),
        ("0::/", V2, {"/sys/fs/cgroup/memory.max": str(GIB)}, GIB),
        ("0::/", V2, {}, math.inf),
        ("", "", {}, math.inf),
        (None, "", {}, math.inf),
    ],
)
def test_the_tightest_control_group_counts(
    tmp_path: Path, groups: str | None, mounts: str, files: dict[str, str], left: float
) -> None:
    assert cgroups.memory_left(write_groups(tmp_path, groups, mounts, files)) == left


def test_without_a_limit_version_1_writes_a_large_number(tmp_path: Path) -> None:
    files = v1("/sys/fs/cgroup/memory", NO_LIMIT, GIB)
    assert cgroups.memory_left(write_groups(tmp_path, "5:memory:/", V1, files)) > 1 << 60


@pytest.mark.parametrize(
    ("free", "limit", "available"),
    [(3 * GIB, "max", 3 * GIB), (30 * GIB, str(8 * GIB), 7 * GIB), (3 * GIB, str(8 * GIB), 3 * GIB), (9, "1", 0)],
)
def test_the_least_of_machine_and_groups_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, limit: str, available: int
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=free))
    root = write_groups(tmp_path, "0::/", V2, v2("/sys/fs/cgroup", limit, GIB))
    assert memory.available(root) == available


def test_a_real_group_counts() -> None:
    limit = 900 << 20
    with real_group("memory", {"memory.max": str(limit), "memory.limit_in_bytes": str(limit)}) as group:
        taken = limit - int(run_python(group, "from llm.devices import memory; print(memory.available())"))
    # the interpreter and its libraries: a torch with CUDA's takes 300 MB
    assert 1 << 20 < taken < 600 << 20


LIMIT = 6 << 30
"""A torch with CUDA's libraries takes 3.3 GB of addresses."""
LIMITED = f"""
import resource
import psutil, torch
print(psutil.Process().memory_info().vms)
from llm.devices.memory import available
for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
    _, most = resource.getrlimit(kind)
    resource.setrlimit(kind, ({LIMIT}, most))
    before = available()
    block = bytearray(1 << 30)
    print(before, available())
    del block
    resource.setrlimit(kind, (most, most))
"""


@pytest.fixture(scope="module")
def limited() -> list[int]:
    """What a process prints: the addresses of torch's libraries, and what each limit leaves before a block and with
    it, in bytes."""
    if sys.platform != "linux":
        pytest.skip("only Linux holds these limits")
    return [*map(int, subprocess.check_output([sys.executable, "-c", LIMITED], cwd=ROOT, text=True).split())]


@pytest.mark.parametrize("limit", [0, 1], ids=["addresses", "data"])
def test_a_limited_address_space_counts(limited: list[int], limit: int) -> None:
    before, after = limited[1 + 2 * limit :][:2]
    # the interpreter and its libraries, and what is left for stacks
    assert LIMIT - memory.STACK_BYTES - 4 * GIB < before < LIMIT - memory.STACK_BYTES
    assert GIB <= before - after < GIB + (1 << 20)


@pytest.mark.slow
def test_the_limits_of_a_shell_bound_the_cache_and_the_threads(limited: list[int], tmp_path: Path) -> None:
    checkpoints.llama(tmp_path / "llama", context=1 << 17)
    question = ["-i", "pregunta=Once upon a time", "-i", "max_tokens=2"]
    model = {"MODEL_ID": "llama", "WEIGHTS_DIR": str(tmp_path), "DTYPE": "float32"}
    # added to the addresses of torch's libraries, of which a build with CUDA has more
    limit = f'ulimit -v {(limited[0] >> 10) + 2_400_000}; exec "$0" -m cli.predict "$@"'
    run = subprocess.run(
        ["bash", "-c", limit, sys.executable, *question],
        cwd=ROOT,
        env={**os.environ, **model, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "Cargado en cpu con 1 hilos" in run.stderr
    size = re.search(r"Caché: \d+ peticiones a la vez de \d+ tokens, hasta (.*) GB", run.stderr)
    assert size and float(size[1].replace(",", ".")) < 1.6


def test_torchs_refusal_after_a_failed_capture_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses() -> None:
        raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    monkeypatch.setattr(torch.cuda, "empty_cache", refuses)
    memory.empty_cuda_cache()
