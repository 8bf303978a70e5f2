"""What Linux's control groups, of version 1 or 2, leave to this process: `docker run -m 8g --cpus 2`, a pod's limits.

A group's limit holds for all groups below it, so the tightest of the process's own group and its ancestors counts. A
container sees none above its own. `root` stands for /, for tests.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/")


def memory_left(root: Path = ROOT) -> float:
    """Bytes that the process's groups may still take; infinite without a limit.

    Cached file contents that were not used lately do not count as taken: the kernel drops them first.
    """
    left = math.inf
    for group in _groups("memory", root):
        for limit, used, cached in (
            ("memory.max", "memory.current", "inactive_file"),
            # above it the kernel does not kill, but slows down until next to nothing moves
            ("memory.high", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            if most := _numbers(group / limit):
                reclaimable = re.search(rf"^{cached} (\d+)$", _text(group / "memory.stat"), re.MULTILINE)
                taken = sum(_numbers(group / used)) - (int(reclaimable[1]) if reclaimable else 0)
                left = min(left, most[0] - taken)
    return left


def processors(root: Path = ROOT) -> float:
    """How many processors' time the process's groups may use; infinite without a quota."""
    quota = math.inf
    for group in _groups("cpu", root):
        shares = _numbers(group / "cpu.max") or [
            *_numbers(group / "cpu.cfs_quota_us"),
            *_numbers(group / "cpu.cfs_period_us"),
        ]
        # version 1 writes -1 for none
        if len(shares) == 2 and min(shares) > 0:
            quota = min(quota, shares[0] / shares[1])
    return quota


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """The folders of the process's group and its ancestors, as far as they are mounted. Not all need to be there."""
    lines = [line.split(":", 2) for line in _text(root / "proc/self/cgroup").splitlines()]
    # version 2 has one hierarchy for all controllers, without a name
    paths = {name: PurePosixPath(path) for _, names, path in lines for name in names.split(",")}
    for line in _text(root / "proc/self/mountinfo").splitlines():
        mount, _, system = line.partition(" - ")
        _, _, _, top, point, *_ = mount.split()
        kind, *_, options = system.split()
        name = {"cgroup": controller, "cgroup2": ""}.get(kind)
        if name not in paths or (name and name not in options.split(",")):
            continue
        # a namespace may name the group from elsewhere: then what is mounted is the process's own
        path = paths[name]
        below = path.relative_to(top) if path.is_relative_to(top) else PurePosixPath()
        mounted = root / point.lstrip("/")
        group = mounted / below
        yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(mounted))


def _numbers(path: Path) -> list[int]:
    """Those of a file of one line; none where it is missing, or says that there is no limit (`max`)."""
    words = _text(path).split()
    return [int(word) for word in words] if all(re.fullmatch(r"-?\d+", word) for word in words) else []


def _text(path: Path) -> str:
    """Empty where there is no such file, or the system does not let this process read it."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
