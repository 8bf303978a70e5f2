"""Hub -> weights/NAME: fetch, convert. Needed once; the only file in llm/ that opens a connection."""

import io
import json
import os
import re
import shutil
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from llm.errors import UserError
from llm.weights import checkpoint, formats
from llm.weights.checkpoint import COMMIT, Weights, is_folder, publish, room, sha256, shown, workspace
from llm.weights.settings import Settings
from llm.words import Say, about

# torch and huggingface_hub are imported where they are used: a command that finds its folder whole needs neither.
if TYPE_CHECKING:
    import httpx2
    import torch
    from transformers import PreTrainedModel

_SECONDS_TO_ANSWER = 10
_LARGEST_FILE = "3GB"
_SHA256 = re.compile(r"[0-9a-f]{64}")

# What transformers reads beside the weights. Never code: trust_remote_code is false everywhere.
_TEXT_FILES = re.compile(
    r"(generation_)?config\.json|chat_template\.(jinja|json)|additional_chat_templates/[\w-]{1,99}\.jinja"
    r"|tokenizer(_config)?\.json|tekken\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt"
    r"|[\w.]{1,99}\.model",
    re.ASCII,
)


@dataclass(frozen=True)
class _HubFile:
    """What the hub says of a file."""

    name: str
    size: int
    digest: str
    """sha256 of one that Git LFS keeps, git's hash of any other."""

    def part(self, work: Path) -> Path:
        """Where it grows. The hash in its name ties it to its content: another revision's part is never continued."""
        return work / f"{self.name}.{self.digest[:16]}.part"

    def is_at(self, path: Path) -> bool:
        from huggingface_hub.utils.sha import git_hash

        if not path.is_file() or path.stat().st_size != self.size:
            return False
        return self.digest == (sha256(path) if _SHA256.fullmatch(self.digest) else git_hash(path.read_bytes()))


def ensure(settings: Settings, say: Say, *, thorough: bool = False) -> Weights:
    """The settings' model in its folder: fetched first where it is not there, then verified, see `checkpoint.verify`.

    Says what it does. Raises UserError; a folder that is there is never changed.
    """
    checkpoint.check_links(settings.weights_dir)
    there = os.path.lexists(settings.folder)
    if not there:
        _fetch(settings, say)
    return checkpoint.verify(settings, thorough=thorough and there)


def _fetch(settings: Settings, say: Say) -> None:
    start = time.monotonic()
    with _in_spanish(settings):
        commit, files = _listing(settings)
        with workspace(settings.folder) as work:
            if os.path.lexists(settings.folder):
                return  # another process brought it while this one asked the hub
            missing = _missing(files, work)
            with room(work, _bytes_left(missing, work) + _converted_bytes(files)):
                _download(settings, commit, files, missing, work, say)
                bins = sorted(work.glob("*.bin"))
                if bins:
                    say(f"Convirtiendo {settings.model_id} a safetensors en bfloat16")
                    _convert(settings, bins, work)
                publish(work, settings, commit)
    size = sum(path.stat().st_size for path in settings.folder.rglob("*"))
    say(f"{settings.model_id} está en {shown(settings.folder)}: {about(size)}, en {time.monotonic() - start:.0f} s")


def _listing(settings: Settings) -> tuple[str, list[_HubFile]]:
    """The commit that the revision names, and those of its files that are needed, config.json first."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        # token=False: without one of ours the client would look for another in the user's home.
        info = HfApi(token=settings.token or False).model_info(
            settings.model_id, revision=settings.revision, files_metadata=True, timeout=_SECONDS_TO_ANSWER
        )
        siblings = {sibling.rfilename: sibling for sibling in info.siblings or []}
        weights_files = formats.hub_weights(siblings)
        formats.check_files(settings.model_id, siblings, weights_files)
        if "config.json" not in siblings or not weights_files:
            raise UserError(
                f"{settings.model_id} no tiene pesos que se puedan usar, config.json con model.safetensors o "
                "pytorch_model.bin: elija otro MODEL_ID"
            )
        texts = {name for name in siblings if _TEXT_FILES.fullmatch(name)} - {"config.json"}
        files = []
        for name in ["config.json", *sorted(texts), *weights_files]:
            size, lfs, digest = siblings[name].size, siblings[name].lfs, siblings[name].blob_id
            kind, digest = (_SHA256, lfs.sha256) if lfs else (COMMIT, digest)
            if type(size) is not int or size < 0 or not kind.fullmatch(digest or ""):
                raise ValueError(f"what is said of {name}")
            files.append(_HubFile(name, size, str(digest)))
        if not COMMIT.fullmatch(info.sha or ""):
            raise ValueError("a commit is a hash")
        return str(info.sha), files
    except (HfHubHTTPError, HFValidationError, json.JSONDecodeError):
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{_hub()} no responde como Hugging Face: compruebe HF_ENDPOINT y MODEL_ID, o pruebe más tarde"
        ) from error


def _missing(files: list[_HubFile], work: Path) -> list[_HubFile]:
    """The files that an earlier run did not finish. What lies in `work` and is none of them goes."""
    wanted = {path for file in files for path in (work / file.name, file.part(work))}
    for path in work.rglob("*"):
        if path not in wanted and not is_folder(path):
            path.unlink()
    return [file for file in files if not file.is_at(work / file.name)]


def _bytes_left(missing: list[_HubFile], work: Path) -> int:
    parts = [file.part(work) for file in missing]
    return sum(file.size for file in missing) - sum(part.stat().st_size for part in parts if part.exists())


def _converted_bytes(files: list[_HubFile]) -> int:
    """The most that the safetensors take which stand for a while beside the .bin they are made from."""
    return sum(file.size for file in files if file.name.endswith(".bin"))


class _Part(io.BufferedWriter):
    """A file on its way, of at most `size` bytes: each write is on the disk when it returns."""

    def __init__(self, path: Path, size: int) -> None:
        super().__init__(io.FileIO(path, "ab"))
        self._size = size

    def write(self, chunk: Any) -> int:
        if self.tell() + len(chunk) > self._size:
            raise _TooLong
        written = super().write(chunk)
        self.flush()
        return written


class _TooLong(Exception):
    """More arrives of a file than the hub said that it has."""


def _download(
    settings: Settings, commit: str, files: list[_HubFile], missing: list[_HubFile], work: Path, say: Say
) -> None:
    from huggingface_hub import constants, get_session, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers, tqdm

    total, left = sum(file.size for file in files), _bytes_left(missing, work)
    rest = f", de los que faltan {about(left)}" if left < total else ""
    say(f"Descargando {settings.model_id} ({commit[:7]}) de {_hub()}: {about(total)}{rest}")

    # As it arrives: http_get would collect 10 MB, and lose them where an answer is cut before.
    constants.DOWNLOAD_CHUNK_SIZE = None  # type: ignore[assignment]
    get_session().event_hooks["response"].append(_without_delay)
    headers = build_hf_headers(token=settings.token or False, headers={"Accept-Encoding": "identity"})
    with tqdm(
        total=total, initial=total - left, desc=settings.folder.name, unit="B", unit_scale=True, disable=None
    ) as bar:
        for file in missing:
            part = file.part(work)
            part.parent.mkdir(exist_ok=True)
            with _Part(part, file.size) as stream, suppress(_TooLong):
                if stream.tell() != file.size:
                    # hf_hub_download throws away what an interrupted run brought; http_get, below it, continues.
                    http_get(
                        hf_hub_url(settings.model_id, file.name, revision=commit),
                        stream,
                        resume_size=stream.tell(),
                        headers=headers,
                        tqdm_class=lambda **_: nullcontext(bar),  # type: ignore[arg-type]  # one bar for all files
                    )
            if not file.is_at(part):
                part.unlink()
                raise UserError(f"{file.name} llegó cambiado de {_hub()}: ejecute script/weights otra vez")
            part.rename(work / file.name)
            if file.name == "config.json":
                _check_config(settings, work)


def _without_delay(response: "httpx2.Response") -> None:
    """Leave how often a busy hub is asked again to the client: the hub may say a day, waited for without a word."""
    for header in ("Retry-After", "RateLimit"):
        response.headers.pop(header, None)


def _check_config(settings: Settings, work: Path) -> None:
    """Before gigabytes are brought that nobody can load. Raises UserError, and then removes `work`."""
    config = work / "config.json"
    try:
        formats.check_config(settings.model_id, config)
    except UserError:
        shutil.rmtree(work)
        raise
    # without a type transformers guesses it from the folder's name, which is not yet the final one
    if b'"model_type"' in config.read_bytes():
        _empty_model(settings, work)


def _empty_model(settings: Settings, work: Path) -> "PreTrainedModel":
    """The model of config.json without its weights. Raises UserError, and removes `work`, where there is none."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(work, trust_remote_code=False)
        if config.is_encoder_decoder:
            # of some, as BART, transformers would make a causal model: the decoder alone
            raise ValueError(config.model_type)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # a stranger's config.json may break any line of transformers
        shutil.rmtree(work)
        raise UserError(f"{settings.model_id} no es un modelo causal que transformers conozca: elija otro") from error
    return model


def _convert(settings: Settings, bins: list[Path], work: Path) -> None:
    """Replace the .bin files by bfloat16 safetensors of the same tensors."""
    import torch

    state: dict[str, torch.Tensor] = {}
    for path in bins:
        try:
            # mmap: a tensor stays in the file until it is written. The format before torch 1.6 knows no such way.
            state |= torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
            if not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
                raise TypeError("a state dict holds tensors")
        except (UnpicklingError, RuntimeError, TypeError, EOFError) as error:
            shutil.rmtree(work)
            raise UserError(
                f"{path.name} de {settings.model_id} no lleva solo pesos: puede llevar código, así que no se abre y se "
                "ha borrado; elija un modelo con safetensors"
            ) from error

    model = _empty_model(settings, work)
    for copy, original in model.all_tied_weights_keys.items():
        if copy in state and original in state and torch.equal(state[copy], state[original]):
            del state[copy]

    write_safetensors(state, work)
    for path in bins:
        path.unlink()


def write_safetensors(state: dict[str, "torch.Tensor"], folder: Path) -> None:
    """Write a model's tensors, each once, as bfloat16 safetensors that transformers loads.

    In files of 3 GB at most, with an index where there are several: no more than one file's tensors are in memory.
    """
    import torch
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    def dtype(tensor: torch.Tensor) -> torch.dtype:
        return torch.bfloat16 if tensor.is_floating_point() else tensor.dtype

    names: dict[tuple[object, ...], str] = {}
    for name, tensor in state.items():
        names.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype), name)
    plan = split_torch_state_dict_into_shards(
        {name: torch.empty(state[name].shape, dtype=dtype(state[name]), device="meta") for name in names.values()},
        max_shard_size=_LARGEST_FILE,
    )
    for file, shard in plan.filename_to_tensors.items():
        tensors = {name: state[name].to(dtype(state[name])).contiguous() for name in shard}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


@contextmanager
def _in_spanish(settings: Settings) -> Iterator[None]:
    """Each way in which the hub or the folder refuses, as the line that a user can act on."""
    import httpx2
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import logging

    # The client speaks English about each retry; the bar shows it.
    logging.set_verbosity_error()
    model, hub = settings.model_id, _hub()
    no_access = f"Su token no da acceso a {model}: pídalo en https://{hub}/{model} con la cuenta del token"
    demo = "o pruebe el modelo de muestra con script/predict --demo"
    try:
        yield
    except GatedRepoError as error:
        if settings.token:
            raise UserError(no_access) from error
        raise UserError(
            f"{model} pide permiso: acéptelo en https://{hub}/{model}, cree un token en "
            f"https://{hub}/settings/tokens y póngalo en .env como HUGGINGFACE_HUB_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{model} no tiene la revisión {settings.revision}: corrija MODEL_REVISION") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"{hub} no tiene ningún modelo {model}: corrija MODEL_ID o, si es privado, ponga en .env el "
            "HUGGINGFACE_HUB_TOKEN de quien pueda verlo"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if settings.token and status == 401:
            raise UserError(
                f"{hub} no reconoce su token: cópielo de nuevo de https://{hub}/settings/tokens, o quite "
                "HUGGINGFACE_HUB_TOKEN si el modelo es público"
            ) from error
        if settings.token and status == 403:
            raise UserError(no_access) from error
        raise UserError(f"{hub} responde con el error {status}: pruebe más tarde, {demo}") from error
    except OfflineModeIsEnabled as error:
        raise UserError(f"Sin conexión con {hub} porque HF_HUB_OFFLINE lo pide: quite esa variable, {demo}") from error
    except (httpx2.RequestError, httpx2.InvalidURL, json.JSONDecodeError) as error:
        raise UserError(f"Sin conexión con {hub}: compruebe la red y repita, que sigue donde quedó, {demo}") from error


def _hub() -> str:
    from huggingface_hub import constants

    # The name alone: an address of a mirror may carry a password.
    return urlsplit(constants.ENDPOINT).hostname or constants.ENDPOINT
