"""Stand-ins for the programs cog and docker that a push runs, with their files."""

import json
import os
import sys
from pathlib import Path
from typing import Any

# Notes its arguments, its folder, and each file's size and inode. As Cog does, builds an image of the weights only if
# they differ from its cache; then notes whether that image exists, and fails.
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
    """Both programs in a folder that `environment` puts first in PATH, with a login to `registry`."""

    def __init__(self, folder: Path, registry: str = "r8.im") -> None:
        self._registry = registry
        self.folder = folder / "bin"
        self.images = folder / "images"
        self._config = folder / "docker" / "config.json"
        for path in (self.folder, self.images, self._config.parent):
            path.mkdir(parents=True)
        self.write("cog", f"#!{sys.executable}\n{COG}")
        self.write("docker", DOCKER)
        # the stores that Docker uses by default
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
        """Write Docker's configuration; None removes it."""
        self._config.unlink(missing_ok=True)
        if config is not None:
            self._config.write_text(json.dumps(config))
