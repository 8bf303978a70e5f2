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

from cli.audit import audit
from llm.errors import UserError
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


def script_audit(folder: Path) -> subprocess.CompletedProcess[str]:
    """The command in a copy of the project whose image has one package."""
    (copied(folder) / "requirements.txt").write_text("python-dotenv==1.2.4\n")
    return subprocess.run([sys.executable, "-m", "cli.audit"], cwd=folder, capture_output=True, text=True)


def test_known_vulnerabilities_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Service, "known", {"python-dotenv": {"PRUEBA-1": "9.9"}, "pytest": {"PRUEBA-2": None}})
    result = script_audit(tmp_path / "project")
    assert (result.returncode, result.stderr) == (1, "")
    lines = result.stdout.splitlines()
    assert f".venv: pytest {pytest.__version__} tiene PRUEBA-2, sin corregir" in lines
    assert any(line.startswith(".venv: 2 fallos conocidos en ") for line in lines)
    assert lines[-2:] == [
        "requirements.txt: python-dotenv 1.2.4 tiene PRUEBA-1, corregido en 9.9",
        "requirements.txt: 1 fallos conocidos en 1 paquetes",
    ]


def test_no_known_vulnerabilities_is_a_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metadata = tmp_path / "uno-1.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: uno\nVersion: 1.0\n")
    assert audit("aquí", "--path", str(tmp_path)) == 0
    assert capsys.readouterr().out == "aquí: 0 fallos conocidos en 1 paquetes\n"


def test_a_service_that_knows_no_package_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="El servicio no conoce ningún paquete de aquí"):
        audit("aquí", "--path", str(tmp_path))


def test_a_service_that_does_not_answer_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Service, "do_POST", lambda self: None)
    result = script_audit(tmp_path / "project")
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("No se pudo preguntar por los paquetes de .venv: compruebe la red y repita (")
