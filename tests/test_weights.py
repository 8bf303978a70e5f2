"""script/weights fetches models into weights/NAME/: the real client, a hub on this machine."""

import importlib
import json
import math
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import close_session, constants
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cli import weights
from llm.errors import UserError
from llm.weights import checkpoint
from llm.weights.hub import ensure, write_safetensors
from llm.weights.settings import ROOT, Settings
from tests.support import checkpoints
from tests.support.command import run_here
from tests.support.hub import COMMIT, Hub, Repository, files_of

pytestmark = pytest.mark.slow

MODEL = "prueba/Falcon-Mini"
NAME = "falcon-mini"
GOOD, NO_ACCESS, WRONG = "hf_buenoXYZ", "hf_ajenoXYZ", "hf_malXYZ"

JUNK = {
    "README.md": b"---",
    "modeling_falcon.py": b"raise SystemExit",
    "model.onnx": b"o",
    "model.gguf": b"g",
    "tf_model.h5": b"h",
    "flax_model.msgpack": b"m",
    "original/consolidated.00.pth": b"p",
    "consolidated.safetensors": b"c",
}


@pytest.fixture(autouse=True, scope="module")
def client() -> Iterator[None]:
    """Afterwards the hub's client is as it was."""
    yield
    importlib.reload(constants)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        hub.tokens = {GOOD: True, NO_ACCESS: False}
        yield hub


@pytest.fixture(scope="module")
def safetensors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("hub") / "safetensors"
    return files_of(checkpoints.falcon(folder, vocabulary=checkpoints.FEW))


@pytest.fixture(scope="module")
def bin(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("hub") / "bin"
    few = checkpoints.FEW
    return files_of(checkpoints.falcon(folder, format="bin", dtype=torch.float32, tied_twice=True, vocabulary=few))


def environment(hub: Hub | str, directory: Path, **variables: str) -> dict[str, str]:
    """The user's environment without a developer's own settings."""
    return {
        **os.environ,
        **dict.fromkeys(("MODEL_REVISION", "DTYPE", "HUGGINGFACE_HUB_TOKEN", "HF_TOKEN", "HF_HUB_OFFLINE"), ""),
        "HF_ENDPOINT": hub if isinstance(hub, str) else hub.endpoint,
        "NO_PROXY": "127.0.0.1",
        "WEIGHTS_DIR": str(directory),
        "MODEL_ID": MODEL,
        **variables,
    }


COMMAND = [sys.executable, "-m", "cli.weights"]


def start(hub: Hub, directory: Path) -> subprocess.Popen[str]:
    """Start script/weights in a process of its own."""
    pipe = subprocess.PIPE
    return subprocess.Popen(COMMAND, cwd=ROOT, env=environment(hub, directory), stdout=pipe, stderr=pipe, text=True)


def run(hub: Hub | str, directory: Path, impatient: bool = False, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run script/weights in this process.

    impatient: the client, which waits some seconds before it asks again, does so at once.
    """

    def sleep(seconds: float) -> None:
        assert seconds < 60, seconds

    def main() -> int:
        # the client reads its variables when it is imported
        importlib.reload(constants)
        return weights.main()

    with pytest.MonkeyPatch.context() as patch:
        if impatient:
            patch.setattr(time, "sleep", sleep)
            patch.setattr("llm.weights.hub._SECONDS_TO_ANSWER", 1)
        result = run_here(main, variables=environment(hub, directory, **variables))
    close_session()
    assert_no_token(result.stdout + result.stderr)
    return result


def fetch(hub: Hub | str, directory: Path, impatient: bool = False, **variables: str) -> str:
    """The output of script/weights, which succeeds."""
    result = run(hub, directory, impatient, **variables)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def refusal(hub: Hub | str, directory: Path, impatient: bool = False, **variables: str) -> str:
    """The error of script/weights, which fails; one line."""
    result = run(hub, directory, impatient, **variables)
    assert result.returncode == 1, result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    (line,) = result.stderr.splitlines()
    return line


def assert_no_token(output: str) -> None:
    assert not any(token in output for token in (GOOD, NO_ACCESS, WRONG))


def contents(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def manifest_of(files: object, **others: object) -> str:
    return json.dumps({"id": MODEL, "revision": None, "commit": COMMIT, "files": files, **others})


def settings(directory: Path, model_id: str = MODEL, revision: str | None = None) -> Settings:
    return Settings(model_id, revision, directory, None, None)


# What is fetched, and what the folder then holds


def test_a_bin_becomes_safetensors(hub: Hub, bin: dict[str, bytes], tmp_path: Path) -> None:
    hub.add(MODEL, {**bin, **JUNK})
    with start(hub, tmp_path) as process:
        out, error = process.communicate()
    assert (process.returncode, error) == (0, "")

    folder = tmp_path / NAME
    assert contents(tmp_path) == {NAME, *(f"{NAME}/{name}" for name in contents(folder))}
    assert contents(folder) == {*bin, "model.safetensors", "manifest.json"} - {"pytorch_model.bin"}
    assert sorted(hub.fetched) == sorted(bin)
    assert f"{MODEL} (0123456) de 127.0.0.1" in out and "bfloat16" in out

    modes = {oct(path.stat().st_mode & 0o444) for path in folder.iterdir()}
    times = {path.stat().st_mtime_ns for path in folder.iterdir()}
    assert modes == {"0o444"}
    assert len(times) == 1 and times.pop() % 1_000_000_000 == 0

    (tmp_path / "source.bin").write_bytes(bin["pytorch_model.bin"])
    source = torch.load(tmp_path / "source.bin", weights_only=True)
    ours = load_file(folder / "model.safetensors")
    assert set(ours) == set(source) - {"lm_head.weight"}
    assert all(torch.equal(ours[name], source[name].to(torch.bfloat16)) for name in ours)

    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["id"], manifest["revision"], manifest["commit"]) == (MODEL, None, COMMIT)
    assert set(manifest["files"]) == contents(folder) - {"manifest.json"}
    for name, file in manifest["files"].items():
        sha256 = subprocess.run(["sha256sum", folder / name], capture_output=True, text=True, check=True).stdout
        assert file == {"size": (folder / name).stat().st_size, "sha256": sha256.split()[0]}

    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    assert torch.equal(loaded["lm_head.weight"], ours["transformer.word_embeddings.weight"].float())


def test_bin_shards_of_both_formats_become_safetensors(hub: Hub, bin: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "source.bin").write_bytes(bin["pytorch_model.bin"])
    state = torch.load(tmp_path / "source.bin", weights_only=True)
    # Equal to the embeddings in a storage of its own: tied nevertheless.
    state["lm_head.weight"] = state["lm_head.weight"].clone()
    state["mask"] = torch.ones(3, dtype=torch.bool)
    names = list(state)
    shards = {}
    for number, (part, new) in enumerate(((names[:5], True), (names[5:], False)), start=1):
        path = tmp_path / "shard"
        torch.save({name: state[name] for name in part}, path, _use_new_zipfile_serialization=new)
        shards[f"pytorch_model-0000{number}-of-00002.bin"] = path.read_bytes()
    texts = {name: content for name, content in bin.items() if name != "pytorch_model.bin"}
    hub.add(MODEL, {**texts, **shards, "pytorch_model.bin.index.json": b"{}"})

    fetch(hub, tmp_path)
    assert contents(tmp_path / NAME) == {*texts, "model.safetensors", "manifest.json"}
    ours = load_file(tmp_path / NAME / "model.safetensors")
    assert set(ours) == set(state) - {"lm_head.weight"}
    assert ours["mask"].dtype == torch.bool


def test_safetensors_are_fetched_as_they_are(
    hub: Hub, safetensors: dict[str, bytes], bin: dict[str, bytes], tmp_path: Path
) -> None:
    hub.add(MODEL, {**bin, **JUNK, **safetensors})
    fetch(hub, tmp_path)
    assert sorted(hub.fetched) == sorted(safetensors)
    assert (tmp_path / NAME / "model.safetensors").read_bytes() == safetensors["model.safetensors"]


def test_sharded_safetensors_are_fetched_with_their_index(hub: Hub, tmp_path: Path) -> None:
    files = {
        "config.json": b"{}",
        "chat_template.jinja": b"t",
        "additional_chat_templates/tool.jinja": b"t",
        "model.safetensors.index.json": b"{}",
        "model-00001-of-00002.safetensors": b"1" * 1000,
        "model-00002-of-00002.safetensors": b"2" * 1000,
        "generation_config.json": b"",
        "tekken.json": b"k",
    }
    hub.add(MODEL, {**files, **JUNK})
    fetch(hub, tmp_path)
    assert {name: (tmp_path / NAME / name).read_bytes() for name in files} == files
    assert sorted(hub.fetched) == sorted(set(files) - {"generation_config.json"})


def test_large_models_are_written_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm.weights.hub._LARGEST_FILE", "10KB")
    state = {name: torch.randn(64, 64) for name in "abc"}
    write_safetensors({**state, "tied": state["a"], "slice": torch.randn(99, 9)[3:5]}, tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == {"a", "b", "c", "slice"}
    assert index["metadata"]["total_size"] == 3 * 64 * 64 * 2 + 2 * 9 * 2
    for name, file in index["weight_map"].items():
        assert load_file(tmp_path / file)[name].dtype == torch.bfloat16


def test_the_bar_shows_the_rate(hub: Hub, tmp_path: Path) -> None:
    hub.add(MODEL, {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": bytes(10_000_000)})
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    process = subprocess.Popen(
        COMMAND, cwd=ROOT, env=environment(hub, tmp_path), stdout=subprocess.DEVNULL, stderr=theirs
    )
    os.close(theirs)
    terminal = b""
    try:
        while chunk := os.read(ours, 65536):
            terminal += chunk
    except OSError:
        pass  # a terminal ends in an error, not in an end of file
    os.close(ours)
    assert process.wait() == 0
    assert re.search(rf"{NAME}: 100%.* [\d.]+[kM]B/s\]", terminal.decode())


# Repeated runs


def test_the_second_run_verifies_and_has_nothing_to_do(hub: Hub, safetensors: dict[str, bytes], tmp_path: Path) -> None:
    hub.add(MODEL, safetensors)
    fetch(hub, tmp_path)
    hub.requests.clear()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / NAME).iterdir()}
    out = fetch(hub, tmp_path)
    assert out == f"{tmp_path}/{NAME} ({MODEL}, 0123456): comprobado; no hay nada que hacer\n"
    assert hub.requests == []
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / NAME).iterdir()}


def interrupted(hub: Hub, directory: Path, stop: signal.Signals, cut: int) -> subprocess.Popen[str]:
    """A run that got `cut` bytes of model.safetensors and was stopped when they were written."""
    hub.repositories[MODEL].stall_after["model.safetensors"] = [cut]
    process = start(hub, directory)
    hub.stalled.wait(60)
    deadline = time.monotonic() + 60
    while sum(part.stat().st_size for part in directory.rglob("model.safetensors.*")) < cut:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(stop)
    return process


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_is_continued(hub: Hub, tmp_path: Path, stop: signal.Signals) -> None:
    files = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": os.urandom(100_000)}
    hub.add(MODEL, files)
    process = interrupted(hub, tmp_path, stop, 65_000)
    _, error = process.communicate()
    if stop is signal.SIGINT:
        assert (process.returncode, error.strip()) == (130, "Interrumpido: repita script/weights para terminar")
    assert not (tmp_path / NAME).exists()

    hub.requests.clear()
    assert "100,0 kB, de los que faltan 35,0 kB" in fetch(hub, tmp_path)
    assert {request.range for request in hub.requests if request.path.startswith("/storage/")} == {"bytes=65000-"}
    assert hub.fetched == ["model.safetensors"]
    assert contents(tmp_path) == {NAME, *(f"{NAME}/{name}" for name in (*files, "manifest.json"))}
    assert (tmp_path / NAME / "model.safetensors").read_bytes() == files["model.safetensors"]


def test_a_partial_download_of_an_older_revision_is_not_continued(hub: Hub, tmp_path: Path) -> None:
    size = 100_000
    repository = hub.add(
        MODEL, {"config.json": b"{}", "tokenizer.json": b"{}", "merges.txt": b"", "model.safetensors": os.urandom(size)}
    )
    interrupted(hub, tmp_path, signal.SIGKILL, 65_000).communicate()
    repository.files = {"config.json": b"[]", "tokenizer.json": b"{}", "model.safetensors": os.urandom(size)}
    fetch(hub, tmp_path)
    assert files_of(tmp_path / NAME).keys() == {*repository.files, "manifest.json"}
    assert files_of(tmp_path / NAME).items() >= repository.files.items()


def test_a_download_resumes_after_each_cut(hub: Hub, tmp_path: Path) -> None:
    files = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": os.urandom(100_003)}
    tenth = 10_000
    hub.add(MODEL, files).cut_after["model.safetensors"] = [tenth] * 10
    fetch(hub, tmp_path, impatient=True)
    assert (tmp_path / NAME / "model.safetensors").read_bytes() == files["model.safetensors"]
    ranges = [request.range for request in hub.requests if request.path.startswith("/storage/")]
    assert ranges == [None, *(f"bytes={number * tenth}-" for number in range(1, 11))]


def test_a_hub_that_stalls_is_asked_again(hub: Hub, tmp_path: Path) -> None:
    files = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": os.urandom(100_000)}
    hub.add(MODEL, files).stall_after["model.safetensors"] = [65_000]
    fetch(hub, tmp_path, HF_HUB_DOWNLOAD_TIMEOUT="1")
    assert (tmp_path / NAME / "model.safetensors").read_bytes() == files["model.safetensors"]
    assert "bytes=65000-" in {request.range for request in hub.requests}


@pytest.mark.parametrize("file", [None, "model.safetensors"])
def test_a_hub_that_always_stalls_is_reported(hub: Hub, small: Repository, tmp_path: Path, file: str | None) -> None:
    small.stall_after[file] = [0] * 9
    line = refusal(hub, tmp_path, impatient=True, HF_HUB_DOWNLOAD_TIMEOUT="1")
    assert line.startswith("Sin conexión con 127.0.0.1: compruebe la red y repita")


def test_after_a_cut_a_hub_without_ranges_still_gives_the_whole_file(hub: Hub, tmp_path: Path) -> None:
    files = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": os.urandom(100_000)}
    repository = hub.add(MODEL, files)
    repository.ranges = False
    repository.cut_after["model.safetensors"] = [65_000]
    fetch(hub, tmp_path, impatient=True)
    assert (tmp_path / NAME / "model.safetensors").read_bytes() == files["model.safetensors"]


def test_a_hub_that_is_busy_is_asked_again(hub: Hub, tmp_path: Path) -> None:
    hub.add(MODEL, {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": b"123"}).statuses[
        "model.safetensors"
    ] = [429, 429]
    fetch(hub, tmp_path, impatient=True)
    assert hub.fetched.count("model.safetensors") == 3


@pytest.mark.parametrize("status", [429, 500])
@pytest.mark.parametrize("file", [None, "model.safetensors"])
def test_a_hub_that_always_fails_is_reported(
    hub: Hub, small: Repository, tmp_path: Path, file: str | None, status: int
) -> None:
    small.statuses[file] = [status] * 9
    line = refusal(hub, tmp_path, impatient=True)
    assert line.startswith(f"127.0.0.1 responde con el error {status}: pruebe más tarde")
    assert not (tmp_path / NAME).exists()


def test_a_file_larger_than_announced_is_not_kept(hub: Hub, tmp_path: Path) -> None:
    repository = hub.add(MODEL, {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": b"123"})
    # the rest never comes: a client that wants it would wait
    repository.delivered["model.safetensors"] = b"123" + bytes(1_000_000)
    repository.stall_after["model.safetensors"] = [65_000]
    assert refusal(hub, tmp_path).startswith("model.safetensors llegó cambiado de 127.0.0.1")
    work = f".{NAME}.partial"
    assert contents(tmp_path) == {work, f"{work}/config.json", f"{work}/tokenizer.json"}
    assert hub.fetched.count("model.safetensors") == 1


def test_a_file_that_arrives_altered_is_not_kept(hub: Hub, safetensors: dict[str, bytes], tmp_path: Path) -> None:
    repository = hub.add(MODEL, safetensors)
    content = safetensors["model.safetensors"]
    repository.delivered["model.safetensors"] = content[:-1] + bytes([content[-1] ^ 1])
    assert "model.safetensors llegó cambiado" in refusal(hub, tmp_path)
    assert not (tmp_path / NAME).exists()

    repository.delivered.clear()
    fetch(hub, tmp_path)
    assert (tmp_path / NAME / "model.safetensors").read_bytes() == content


def test_a_second_run_at_once_is_refused(hub: Hub, safetensors: dict[str, bytes], tmp_path: Path) -> None:
    hub.add(MODEL, safetensors)
    with checkpoint.workspace(tmp_path / NAME):
        assert "Otro proceso está descargando" in refusal(hub, tmp_path)


# A folder that exists


@pytest.fixture
def fetched(hub: Hub, tmp_path: Path) -> Path:
    hub.add(MODEL, {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": b"0123456789" * 1000})
    fetch(hub, tmp_path)
    hub.requests.clear()
    return tmp_path / NAME


def test_a_cut_file_is_named(hub: Hub, fetched: Path) -> None:
    os.truncate(fetched / "model.safetensors", 1234)
    line = refusal(hub, fetched.parent)
    assert f"{fetched}/model.safetensors" in line
    assert "1.234 bytes en vez de 10.000" in line and f"borre {fetched}" in line
    with pytest.raises(UserError, match=r"1\.234 bytes"):
        ensure(settings(fetched.parent), print)
    assert (fetched / "model.safetensors").stat().st_size == 1234
    assert hub.requests == []


def test_an_altered_file_is_named(hub: Hub, fetched: Path) -> None:
    path = fetched / "model.safetensors"
    with path.open("r+b") as stream:
        stream.write(b"x")
    assert f"{path} está alterado" in refusal(hub, fetched.parent)
    with pytest.raises(UserError, match="está alterado"):
        ensure(settings(fetched.parent), print)

    # With the manifest's time the file passes for untouched at a start; script/weights hashes it.
    manifest = (fetched / "manifest.json").stat()
    os.utime(path, ns=(manifest.st_mtime_ns, manifest.st_mtime_ns))
    assert ensure(settings(fetched.parent), print).verified
    assert f"{path} está alterado" in refusal(hub, fetched.parent)


def test_a_missing_file_is_named(hub: Hub, fetched: Path) -> None:
    (fetched / "config.json").unlink()
    assert f"Falta {fetched}/config.json" in refusal(hub, fetched.parent)


def test_a_copy_with_new_times_is_verified(fetched: Path, tmp_path: Path) -> None:
    shutil.copytree(fetched, tmp_path / "copia" / NAME, copy_function=shutil.copyfile)
    assert ensure(settings(tmp_path / "copia"), print).verified


HASH = "0" * 64


@pytest.mark.parametrize(
    "content",
    [
        '{"id": "x"',
        "[]",
        "[" * 200_000,
        "null",
        '{"id": "x", "files": []}',
        manifest_of({}),
        manifest_of({"config.json": {"size": 2}}),
        manifest_of({"config.json": {"size": "2", "sha256": HASH}}),
        manifest_of({"config.json": {"size": 2, "sha256": 5}}),
        manifest_of({"config.json": {"size": math.inf, "sha256": HASH}}).replace("Infinity", "1e999"),
        manifest_of({"config.json": 5}),
        manifest_of({"../config.json": {"size": 2, "sha256": HASH}}),
        manifest_of({"/etc/passwd": {"size": 2, "sha256": HASH}}),
        manifest_of({"a/../config.json": {"size": 2, "sha256": HASH}}),
        manifest_of({"./config.json": {"size": 2, "sha256": HASH}}),
        manifest_of({"uno\ndos": {"size": 2, "sha256": HASH}}),
        manifest_of({"config.json": {"size": 2, "sha256": HASH}}, commit=5),
        manifest_of({"config.json": {"size": 2, "sha256": HASH}}, id="uno\ndos"),
    ],
    ids=range(18),
)
def test_a_broken_manifest_is_named(fetched: Path, content: str) -> None:
    (fetched / "manifest.json").write_text(content)
    with pytest.raises(UserError) as error:
        ensure(settings(fetched.parent), print)
    assert str(error.value).startswith(f"{fetched}/manifest.json no se entiende") and "\n" not in str(error.value)


def test_a_manifest_that_is_no_file_is_named(hub: Hub, fetched: Path) -> None:
    manifest = fetched / "manifest.json"
    manifest.rename(fetched.parent / "manifest.json")
    for make in (
        manifest.mkdir,
        lambda: manifest.symlink_to("no"),
        lambda: manifest.symlink_to("../manifest.json"),
        lambda: os.mkfifo(manifest),
    ):
        make()
        with pytest.raises(UserError, match="no se entiende"):
            ensure(settings(fetched.parent), print)
        manifest.rmdir() if manifest.is_dir() else manifest.unlink()


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "added_tokens.json", "additional_chat_templates/a.jinja", "n" * 200]
)
def test_a_file_that_the_manifest_does_not_name_is_refused(hub: Hub, fetched: Path, name: str) -> None:
    (fetched / name).parent.mkdir(exist_ok=True)
    (fetched / name).write_text("{}")
    line = f"{fetched}/{name} sobra, manifest.json no lo nombra: bórrelo (si es suyo, borre solo {fetched}/manifest"
    assert refusal(hub, fetched.parent).startswith(line)
    with pytest.raises(UserError, match="sobra"):
        ensure(settings(fetched.parent), print)
    (fetched / name).unlink()
    assert ensure(settings(fetched.parent), print).verified


def test_a_link_out_of_the_folder_is_refused(hub: Hub, fetched: Path) -> None:
    path, elsewhere = fetched / "model.safetensors", fetched.parent / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    assert f"{path} es un enlace" in refusal(hub, fetched.parent)
    path.unlink()
    os.mkfifo(path)
    assert f"{path} es un enlace u otra cosa" in refusal(hub, fetched.parent)


def test_a_link_to_the_folder_is_followed(fetched: Path, tmp_path: Path) -> None:
    (tmp_path / "otra").mkdir()
    (tmp_path / "otra" / NAME).symlink_to(fetched)
    assert ensure(settings(tmp_path / "otra"), print, thorough=True).verified


def weights_dir(place: Path) -> Path:
    return place / "weights"


def folder(place: Path) -> Path:
    return place / "weights" / NAME


def file(place: Path) -> Path:
    return place / "weights" / NAME / "model.safetensors"


@pytest.mark.parametrize("link", [weights_dir, folder, file])
def test_a_broken_link_is_reported_before_any_request(
    hub: Hub, small: Repository, tmp_path: Path, link: Callable[[Path], Path]
) -> None:
    """As in an image that `cog build` makes of a folder with links to the weights."""
    path = link(tmp_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix:
        (path.parent / "config.json").write_text("{}")
    path.symlink_to("/datos/otro")
    line = f"{path} es un enlace a /datos/otro, que aquí no existe: ponga en su lugar lo que enlaza (script/push sigue"
    assert refusal(hub, tmp_path / "weights").startswith(line)


def test_a_name_that_the_disk_cannot_hold_is_a_missing_file(fetched: Path) -> None:
    manifest = json.loads((fetched / "manifest.json").read_text())
    manifest["files"]["n" * 300] = {"size": 2, "sha256": HASH}
    (fetched / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=f"Falta {fetched}/nnn"):
        ensure(settings(fetched.parent), print)


def test_another_model_or_revision_of_the_same_name_is_refused(hub: Hub, fetched: Path) -> None:
    line = refusal(hub, fetched.parent, MODEL_ID="otro/falcon-mini")
    assert MODEL in line and "otro/falcon-mini" in line
    assert "es la revisión main" in refusal(hub, fetched.parent, MODEL_REVISION="v9")
    assert ensure(settings(fetched.parent, revision=COMMIT), print).commit == COMMIT


@pytest.mark.parametrize("names", [(), ("config.json",), ("model.safetensors",), ("config.json", "notas.txt")])
def test_a_folder_that_is_no_model_is_refused(hub: Hub, tmp_path: Path, names: tuple[str, ...]) -> None:
    folder = tmp_path / NAME
    folder.mkdir()
    for name in names:
        (folder / name).write_text("{}")
    line = refusal(hub, tmp_path)
    assert line.startswith(f"{folder} no es un modelo, le falta config.json o los pesos")
    assert contents(folder) == set(names)
    assert hub.requests == []


def test_a_folder_of_the_users_own_is_used_unverified(hub: Hub, tmp_path: Path) -> None:
    folder = checkpoints.falcon(tmp_path / NAME, vocabulary=checkpoints.FEW)
    model = ensure(settings(tmp_path), print)
    assert (model.folder, model.commit, model.verified) == (folder, None, False)
    out = fetch(hub, tmp_path)
    assert out == f"{folder} (carpeta propia): no se comprueba, porque no tiene manifest.json; no hay nada que hacer\n"
    assert hub.requests == []


# What the hub refuses


def test_a_missing_network_is_reported(tmp_path: Path) -> None:
    with Hub() as gone:
        endpoint = gone.endpoint
    line = refusal(endpoint, tmp_path)
    assert line.startswith("Sin conexión con 127.0.0.1") and "script/predict --demo" in line
    assert contents(tmp_path) == set()


def test_offline_by_choice_is_reported(hub: Hub, tmp_path: Path) -> None:
    line = refusal(hub, tmp_path, HF_HUB_OFFLINE="1")
    assert line.startswith("Sin conexión") and "HF_HUB_OFFLINE" in line and "script/predict --demo" in line
    assert hub.requests == []


Description = dict[str, Any]


def first(body: Description, **changes: object) -> Description:
    """The description with changes in the fields of its first file."""
    return {**body, "siblings": [{**body["siblings"][0], **changes}, *body["siblings"][1:]]}


@pytest.mark.parametrize(
    "describe",
    [
        lambda body: [],
        lambda body: {},
        lambda body: None,
        lambda body: b"[" * 200_000,
        lambda body: b"\xff",
        lambda body: {**body, "siblings": 5},
        lambda body: {**body, "sha": "../.."},
        lambda body: {**body, "createdAt": "ayer"},
        lambda body: first(body, size="123"),
        lambda body: first(body, size=-1),
        lambda body: first(body, size=None),
        lambda body: first(body, blobId="../../../x"),
        lambda body: first(body, lfs={"size": 2, "sha256": "../../../x", "pointerSize": 1}),
        lambda body: first(body, rfilename=["config.json"]),
    ],
    ids=range(14),
)
def test_an_invalid_description_is_reported(
    hub: Hub, small: Repository, tmp_path: Path, describe: Callable[[Description], object]
) -> None:
    small.describe = describe
    line = refusal(hub, tmp_path)
    assert line.startswith("127.0.0.1 no responde como Hugging Face: compruebe HF_ENDPOINT")
    assert contents(tmp_path) == set() and not hub.fetched


def test_a_web_page_instead_of_the_hub_is_reported(hub: Hub, small: Repository, tmp_path: Path) -> None:
    small.describe = lambda body: b"<html>"
    assert refusal(hub, tmp_path).startswith("Sin conexión con 127.0.0.1")


def test_a_file_whose_name_no_disk_can_hold_is_skipped(hub: Hub, small: Repository, tmp_path: Path) -> None:
    for name in ("n" * 300 + ".model", f"model-{'1' * 300}-of-00001.safetensors", "../../x.model"):
        small.files[name] = b"x"
    fetch(hub, tmp_path)
    assert sorted(hub.fetched) == ["config.json", "model.safetensors", "tokenizer.json"]


@pytest.fixture
def small(hub: Hub) -> Repository:
    return hub.add(MODEL, {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": b"123"})


@pytest.mark.parametrize("token", ["", GOOD])
def test_an_unknown_model_is_refused(hub: Hub, tmp_path: Path, token: str) -> None:
    line = refusal(hub, tmp_path, MODEL_ID="nadie/nada", HF_TOKEN=token)
    assert "no tiene ningún modelo nadie/nada" in line and "MODEL_ID" in line
    assert contents(tmp_path) == set()


def test_an_unknown_revision_is_refused(hub: Hub, small: Repository, tmp_path: Path) -> None:
    assert f"{MODEL} no tiene la revisión v9" in refusal(hub, tmp_path, MODEL_REVISION="v9")


def test_a_revision_is_resolved_to_its_commit(hub: Hub, small: Repository, tmp_path: Path) -> None:
    fetch(hub, tmp_path, MODEL_REVISION="rama/una")
    assert ensure(settings(tmp_path), print).commit == COMMIT
    assert ensure(settings(tmp_path, revision="rama/una"), print).commit == COMMIT


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("", f"{MODEL} pide permiso: acéptelo en https://127.0.0.1/{MODEL}, cree un token"),
        (NO_ACCESS, f"Su token no da acceso a {MODEL}"),
        (WRONG, "127.0.0.1 no reconoce su token"),
    ],
)
def test_a_gated_model_is_refused(hub: Hub, small: Repository, tmp_path: Path, token: str, message: str) -> None:
    small.gated = True
    assert message in refusal(hub, tmp_path, HUGGINGFACE_HUB_TOKEN=token)
    assert not (tmp_path / NAME).exists()


def test_a_gated_model_is_fetched_with_a_token(hub: Hub, small: Repository, tmp_path: Path) -> None:
    small.gated = True
    fetch(hub, tmp_path, HUGGINGFACE_HUB_TOKEN=GOOD)
    assert {request.token for request in hub.requests if request.file} == {GOOD}
    assert (tmp_path / NAME / "model.safetensors").read_bytes() == b"123"


TEXTS = {"config.json": b"{}", "tokenizer.json": b"{}"}
WEIGHTS = {"model.safetensors": b"123"}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({**TEXTS, **JUNK}, "no tiene pesos que se puedan usar, solo GGUF, los de llama.cpp: elija el modelo original"),
        ({"README.md": b"---", "modelo-Q4_K_M.gguf": b"g"}, "no tiene pesos que se puedan usar, solo GGUF"),
        ({**TEXTS, "tf_model.h5": b"h"}, "no tiene pesos que se puedan usar, config.json con model.safetensors"),
        ({"tokenizer.json": b"{}", **WEIGHTS}, "no tiene pesos que se puedan usar, config.json con model.safetensors"),
        ({}, "no tiene pesos que se puedan usar, config.json con model.safetensors"),
        (
            {"adapter_config.json": b"{}", "adapter_model.safetensors": b"1"},
            "es un adaptador (LoRA) sin su modelo base",
        ),
        ({"config.json": b"{}", **WEIGHTS}, "no trae ningún tokenizador que se admita: hace falta tokenizer.json"),
        (
            {"config.json": b"{}", **WEIGHTS, "tokenizer.model": b"t", "tokenizer_config.json": b"{}"},
            "no trae ningún tokenizador que se admita (solo tokenizer.model): hace falta tokenizer.json",
        ),
        ({**TEXTS, **WEIGHTS, "quantize_config.json": b"{}"}, "está cuantizado (gptq)"),
    ],
)
def test_an_unusable_model_is_refused_by_its_list_of_files(
    hub: Hub, tmp_path: Path, files: dict[str, bytes], message: str
) -> None:
    hub.add(MODEL, files)
    assert f"{MODEL} {message}" in refusal(hub, tmp_path)
    assert hub.fetched == []


@pytest.mark.parametrize("names", [["vocab.json", "merges.txt"], ["vocab.txt"], ["tekken.json"]])
def test_the_files_of_a_tokenizer_are_fetched(hub: Hub, tmp_path: Path, names: list[str]) -> None:
    hub.add(MODEL, {"config.json": b"{}", **WEIGHTS, **dict.fromkeys(names, b"x")})
    fetch(hub, tmp_path)
    assert sorted(hub.fetched) == sorted(["config.json", *WEIGHTS, *names])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "está cuantizado (gptq), y aquí los pesos van en",
        ),
        ({"quantization_config": {"load_in_4bit": True}}, "está cuantizado (bitsandbytes)"),
        ({"model_type": "t5"}, "no es un modelo causal que transformers conozca"),
        ({"model_type": "bart"}, "no es un modelo causal que transformers conozca"),
        ({"model_type": "desconocido"}, "no es un modelo causal que transformers conozca"),
    ],
)
def test_an_unusable_model_is_refused_by_its_config(
    hub: Hub, tmp_path: Path, config: dict[str, object], message: str
) -> None:
    hub.add(MODEL, {**TEXTS, **WEIGHTS, "config.json": json.dumps(config).encode()})
    assert f"{MODEL} {message}" in refusal(hub, tmp_path)
    # nothing else was fetched, and nothing stays
    assert hub.fetched == ["config.json"]
    assert contents(tmp_path) == set()


class Trap:
    """Pickled, a command that runs when the pickle is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return (os.system, (f"touch {self.mark}",))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_bin_that_carries_code_is_not_opened(hub: Hub, bin: dict[str, bytes], tmp_path: Path, zipped: bool) -> None:
    mark, path = tmp_path / "mark", tmp_path / "trap.bin"
    torch.save({"a": torch.zeros(2), "b": Trap(mark)}, path, _use_new_zipfile_serialization=zipped)
    hub.add(MODEL, {"config.json": bin["config.json"], "tokenizer.json": b"{}", "pytorch_model.bin": path.read_bytes()})
    assert f"pytorch_model.bin de {MODEL} no lleva solo pesos" in refusal(hub, tmp_path)
    assert contents(tmp_path) == {"trap.bin"}


def test_a_bin_without_tensors_is_refused(hub: Hub, bin: dict[str, bytes], tmp_path: Path) -> None:
    torch.save({"a": 1}, tmp_path / "one.bin")
    hub.add(
        MODEL,
        {
            "config.json": bin["config.json"],
            "tokenizer.json": b"{}",
            "pytorch_model.bin": (tmp_path / "one.bin").read_bytes(),
        },
    )
    assert f"pytorch_model.bin de {MODEL} no lleva solo pesos" in refusal(hub, tmp_path)


@pytest.mark.parametrize("changes", [{"model_type": "desconocido"}, {"num_attention_heads": 0}, {"hidden_size": "a"}])
def test_an_unknown_architecture_is_refused(
    hub: Hub, bin: dict[str, bytes], tmp_path: Path, changes: dict[str, object]
) -> None:
    config = {**json.loads(bin["config.json"]), **changes}
    hub.add(MODEL, {**bin, "config.json": json.dumps(config).encode(), "configuration_falcon.py": b"raise SystemExit"})
    assert f"{MODEL} no es un modelo causal que transformers conozca" in refusal(hub, tmp_path)
    # nothing else was fetched, and nothing stays
    assert hub.fetched == ["config.json"]
    assert contents(tmp_path) == set()


# What the disk refuses


def test_a_model_that_does_not_fit_on_the_disk_is_refused(hub: Hub, small: Repository, tmp_path: Path) -> None:
    small.announced["model.safetensors"] = 10**18
    line = refusal(hub, tmp_path)
    assert line.startswith(f"No hay sitio en {tmp_path}: hacen falta 1000000000,0 GB y quedan ")
    assert hub.fetched == []


def test_a_disk_that_fills_up_while_fetching_is_reported(hub: Hub, tmp_path: Path) -> None:
    hub.add(MODEL, {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": bytes(10_000_000)})
    interrupted(hub, tmp_path, signal.SIGKILL, 1000).communicate()
    # A device on which every write fails as on a full disk.
    (part,) = tmp_path.rglob("model.safetensors.*")
    part.unlink()
    part.symlink_to("/dev/full")
    line = refusal(hub, tmp_path)
    assert line.startswith(f"No hay sitio en {tmp_path}: hacen falta 10,0 MB y quedan ")
    assert not (tmp_path / NAME).exists()


@pytest.mark.skipif(
    subprocess.run(["unshare", "--user", "--map-root-user", "--mount", "true"], capture_output=True).returncode != 0,
    reason="needs a mount of its own",
)
def test_a_disk_that_fills_up_while_converting_is_reported(tmp_path: Path) -> None:
    code = f"""
import torch
from pathlib import Path
from llm.weights import checkpoint, hub
with checkpoint.workspace(Path("{tmp_path}/disk/{NAME}")) as work, checkpoint.room(work, 5):
    hub.write_safetensors({{"a": torch.zeros(2_000_000)}}, work)
"""
    (tmp_path / "disk").mkdir()
    mount = f"mount -t tmpfs -o size=1m tmpfs {tmp_path}/disk && exec {sys.executable} -c '{code}'"
    process = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c", mount],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert f"UserError: No hay sitio en {tmp_path}/disk: hacen falta 5 bytes y quedan 1,0 MB libres" in process.stderr


def test_a_weights_dir_that_cannot_be_written_is_refused(hub: Hub, small: Repository, tmp_path: Path) -> None:
    (tmp_path / "archivo").write_text("")
    assert refusal(hub, tmp_path / "archivo") == (
        f"No se puede escribir en {tmp_path}/archivo, parte de la ruta no es una carpeta: cambie WEIGHTS_DIR"
    )


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("/proc/no", "no existe"),
        ("vuelta/modelos", "los enlaces dan vueltas"),
        ("n" * 300, "el nombre es demasiado largo"),
    ],
)
def test_an_impossible_weights_dir_is_refused(
    hub: Hub, small: Repository, tmp_path: Path, place: str, reason: str
) -> None:
    (tmp_path / "vuelta").symlink_to(tmp_path / "vuelta")
    path = tmp_path / place
    assert refusal(hub, path) == f"No se puede escribir en {path}, {reason}: cambie WEIGHTS_DIR"
