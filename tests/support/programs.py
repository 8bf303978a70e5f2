"""The programs cog and docker as a push meets them, ours, with what they keep."""

import json
import os
import sys
from pathlib import Path
from typing import Any

# What it was given: its arguments, where it ran, and of each file the size and where its bytes are on the disk. Of the
# weights it builds an image if they are not as its notes say, as Cog does, and fails where the image is not there.
COG = """\
import json, os, pathlib, sys, uuid, zlib
if sys.argv[1:] == ["--version"]:
    print("cog version 0.23.1 (built 2026-10-01T12:00:00Z)")
    sys.exit()
files = {str(p): [p.lstat().st_size, p.lstat().st_ino] for p in pathlib.Path().rglob("*") if p.is_file()}
files = {name: file for name, file in files.items() if not name.startswith(".cog/")}
cache = pathlib.Path(".cog/cache/weights_manifest.json")
image = pathlib.Path(os.environ["IMAGES"], f"{sys.argv[3]}-weights".replace("/", "_"))
weights = {str(p): zlib.crc32(p.read_bytes()) for p in sorted(pathlib.Path("weights").rglob("*")) if p.is_file()}
build = not cache.exists() or json.loads(cache.read_text()) != weights
if build:
    image.write_text(f"sha256:{uuid.uuid4().hex}")
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_text(json.dumps(weights))
notes = {"arguments": sys.argv[1:], "folder": os.getcwd(), "files": files, "built": build, "image": image.exists()}
notes["variables"] = dict(os.environ)
pathlib.Path(os.environ["NOTES"]).write_text(json.dumps(notes))
print("You are not logged in", file=sys.stderr)
sys.exit(3)
"""

DOCKER = """\
#!/bin/sh
case "$1 $2" in
"version --format") echo 29.0.1 ;;
"image inspect") exec cat "$IMAGES/$(echo "$5" | tr / _)" ;;
*) exit 125 ;;
esac
"""


class Programs:
    """In a folder of their own; with `environment` they are found first. Someone is logged in to a registry."""

    def __init__(self, folder: Path, registry: str = "r8.im") -> None:
        self._registry = registry
        self.folder = folder / "bin"
        self.images = folder / "images"
        self._config = folder / "docker" / "config.json"
        for path in (self.folder, self.images, self._config.parent):
            path.mkdir(parents=True)
        self.write("cog", f"#!{sys.executable}\n{COG}")
        self.write("docker", DOCKER)
        # those that Docker would find by itself
        for store in ("osxkeychain", "pass", "secretservice"):
            self.write(f"docker-credential-{store}", "#!/bin/sh\necho 'credentials not found'; exit 1\n")
        self.login({"auths": {registry: {"auth": "dXN1YXJpbzpzZWNyZXRv"}}})

    @property
    def environment(self) -> dict[str, str]:
        return {
            "PATH": os.pathsep.join([str(self.folder), os.environ["PATH"]]),
            "IMAGES": str(self.images),
            "DOCKER_CONFIG": str(self._config.parent),
            "COG_REGISTRY_HOST": self._registry,
        }

    def read(self, name: str) -> str:
        return (self.folder / name).read_text()

    def write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.write_text(text)
        path.chmod(0o755)

    def login(self, config: Any) -> None:
        """What Docker's configuration says; None where there is none."""
        self._config.unlink(missing_ok=True)
        if config is not None:
            self._config.write_text(json.dumps(config))
