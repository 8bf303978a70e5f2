"""script/audit: the real pip-audit, asking a small service on 127.0.0.1 that answers as OSV does."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cli.audit import audit, main
from llm.errors import UserError
from tests.support.command import run_here
from tests.support.project import copied

pytestmark = pytest.mark.slow


class Service(BaseHTTPRequestHandler):
    """Answers with a package's vulnerabilities, and the version that fixes each."""

    known: dict[str, dict[str, str | None]] = {}  # noqa: RUF012

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        package = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["package"]
        answer = {"vulns": [vulnerability(package, *entry) for entry in self.known.get(package["name"], {}).items()]}
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def vulnerability(package: dict[str, str], id: str, fixed: str | None) -> dict[str, Any]:
    events = [{"introduced": "0"}, *([{"fixed": fixed}] if fixed else [])]
    return {"id": id, "affected": [{"package": package, "ranges": [{"type": "ECOSYSTEM", "events": events}]}]}


@pytest.fixture(autouse=True)
def _service(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Service) as service:
        threading.Thread(target=service.serve_forever, kwargs={"poll_interval": 0.05}).start()
        monkeypatch.setenv("PIP_AUDIT_VULNERABILITY_SERVICE", "osv")
        monkeypatch.setenv("PIP_AUDIT_OSV_URL", f"http://127.0.0.1:{service.server_address[1]}")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield
        service.shutdown()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder with one package, uno."""
    metadata = tmp_path / "site" / "uno-1.0.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: uno\nVersion: 1.0\n")
    return tmp_path / "site"


def test_known_vulnerabilities_are_named(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Service, "known", {"python-dotenv": {"PRUEBA-1": "9.9"}, "uno": {"PRUEBA-2": None}})
    (tmp_path / "requirements.txt").write_text("python-dotenv==1.2.4\n")
    monkeypatch.setattr("cli.audit.ROOT", tmp_path)
    assert audit("aquí", "--path", str(package)) == 1
    assert audit("requirements.txt", "--requirement", "requirements.txt") == 1
    assert capsys.readouterr().out.splitlines() == [
        "aquí: uno 1.0 tiene PRUEBA-2, sin corregir",
        "aquí: 1 fallos conocidos en 1 paquetes",
        "requirements.txt: python-dotenv 1.2.4 tiene PRUEBA-1, corregido en 9.9",
        "requirements.txt: 1 fallos conocidos en 1 paquetes",
    ]


@pytest.mark.parametrize(("faults", "status"), [([0, 0], 0), ([0, 1], 1), ([2, 0], 1)])
def test_a_vulnerability_anywhere_is_a_failure(monkeypatch: pytest.MonkeyPatch, faults: list[int], status: int) -> None:
    remaining = iter(faults)
    monkeypatch.setattr("cli.audit.audit", lambda *_: next(remaining))
    assert run_here(main, variables={}).returncode == status


def test_no_known_vulnerabilities_is_a_success(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert audit("aquí", "--path", str(package)) == 0
    assert capsys.readouterr().out == "aquí: 0 fallos conocidos en 1 paquetes\n"


def test_a_service_that_knows_no_package_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="El servicio no conoce ningún paquete de aquí"):
        audit("aquí", "--path", str(tmp_path))


def test_a_service_that_does_not_answer_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Service, "do_POST", lambda self: None)
    (copied(tmp_path / "project") / "requirements.txt").write_text("python-dotenv==1.2.4\n")
    command = [sys.executable, "-m", "cli.audit"]
    result = subprocess.run(command, cwd=tmp_path / "project", capture_output=True, text=True)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("No se pudo preguntar por los paquetes de .venv: compruebe la red y repita (")
