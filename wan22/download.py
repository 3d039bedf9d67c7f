"""Fetch checkpoints and prove every byte of them: the library behind `wan22 download`.

huggingface_hub gives the listing, the session (HF_ENDPOINT, HF_TOKEN, proxies, timeouts, offline mode), xet and the
cache's layout. Ours is the rest: which files inference needs, the disk checked before the first byte, one progress bar,
a lock, every file hashed as it comes, and going on. The loop over the bytes is ours too, because huggingface_hub throws
a partial file away when it stops (its issue 4228): a kill would cost up to eight shards of 10 GB. Here a partial file
stays in `.wan22/parts` under its path and digest, and the next run asks for what is missing from it, byte for byte.

Everything that can go wrong ends as one `WanError`: RequestError (2) for what was asked, DoesNotFit (3) for the disk,
RunError (1) for what a network or a server did.
"""

import errno
import itertools
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import filelock
import httpx2
from huggingface_hub import HfApi, constants, get_session, hf_hub_url
from huggingface_hub import errors as hub_errors
from huggingface_hub.file_download import get_hf_file_metadata, repo_folder_name
from huggingface_hub.utils import WeakFileLock, build_hf_headers, hf_raise_for_status
from tqdm import tqdm

from . import verify
from .config import DoesNotFit, RequestError, RunError, WanError
from .verify import PUBLISHED, KnownFile, Record, human

T = TypeVar("T")


@dataclass(frozen=True)
class Repo:
    """A repository known by a short name. files: exactly these; None: those that inference needs."""

    repo_id: str
    files: tuple[str, ...] | None = None


def _pair(folder: str) -> Repo:
    names = (f"{folder}/high_noise_model.safetensors", f"{folder}/low_noise_model.safetensors")
    return Repo("lightx2v/Wan2.2-Lightning", names)


# The adapters' names are those of their publisher's repositories (also in diffusers', LightX2V's and vllm-omni's
# configurations); each pair is the high-noise expert's adapter, then the low-noise one's.
DEFAULT_REPO = "Wan2.2-T2V-A14B"
SHORT_NAMES = {
    DEFAULT_REPO: Repo(PUBLISHED),
    "Wan2.2-T2V-A14B-Diffusers": Repo("Wan-AI/Wan2.2-T2V-A14B-Diffusers"),
    "lightning": _pair("Wan2.2-T2V-A14B-4steps-lora-rank64-Seko-V1.1"),
    "lightning-250928": _pair("Wan2.2-T2V-A14B-4steps-lora-250928"),
    "lightning-v2.0": _pair("Wan2.2-T2V-A14B-4steps-lora-rank64-Seko-V2.0"),
    "lightx2v-1217": Repo(
        "lightx2v/Wan2.2-Distill-Loras",
        (
            "wan2.2_t2v_A14b_high_noise_lora_rank64_lightx2v_4step_1217.safetensors",
            "wan2.2_t2v_A14b_low_noise_lora_rank64_lightx2v_4step_1217.safetensors",
        ),
    ),
}
NEEDED_SUFFIXES = (".safetensors", ".gguf", ".pth", ".json", ".model", ".txt")  # weights, configs, indexes, tokenizers
SOURCES = ("hub", "modelscope")

TRANSIENT_STATUS = (408, 429, 500, 502, 503, 504)
TRANSIENT = (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError, httpx2.ProxyError)
LONGEST_WAIT_S = 600  # a server that asks for more patience than this is named instead


@dataclass(frozen=True)
class Patience:
    """How long to bear with a server. tries: in a row, without one new byte; the wait before the second is `wait_s`
    and doubles; `stall_s` of silence drop a connection (None: HF_HUB_DOWNLOAD_TIMEOUT, by default 10 s)."""

    tries: int = 5
    wait_s: float = 1.0
    stall_s: float | None = None


@dataclass(frozen=True)
class Download:
    """What `download` did, or with `dry_run` would do. Sizes in bytes.

    folder: where the files are; files: all that was asked for; fetched: those of them that were (or are to be) fetched;
    bytes_needed: what `fetched` adds to the disk, without what partial files already hold; bytes_free: on that disk,
    before.
    """

    folder: Path
    repo_id: str
    commit: str | None
    files: tuple[KnownFile, ...]
    fetched: tuple[KnownFile, ...]
    bytes_needed: int
    bytes_free: int

    @property
    def fits(self) -> bool:
        return self.bytes_needed <= self.bytes_free

    @property
    def bytes_total(self) -> int:
        return sum(file.size for file in self.files)

    def to_dict(self) -> dict[str, Any]:
        numbers = ("commit", "repo_id", "bytes_total", "bytes_needed", "bytes_free", "fits")
        return {
            "folder": str(self.folder),
            **{name: getattr(self, name) for name in numbers},
            "files": [{"path": f.path, "size": f.size, "fetch": f in self.fetched} for f in self.files],
        }


@dataclass(frozen=True)
class Target:
    """Where files go. blobs: in the Hub cache, the folder that holds the contents that `folder` then links to."""

    folder: Path
    blobs: Path | None = None

    @property
    def state(self) -> Path:
        return verify.state_dir(self.folder)

    def path(self, file: KnownFile) -> Path:
        """Where `file` is, or will be; in the cache, a content that is there already counts without its link."""
        linked = self.folder / file.path
        return self.blobs / file.blob if self.blobs and not linked.is_file() else linked

    def part(self, file: KnownFile) -> Path:
        """Its partial content. The digest in the name keeps another version of the file from being continued."""
        return self.state / "parts" / f"{file.path}.{file.digest[:12]}"

    def bytes_needed(self, files: Sequence[KnownFile]) -> int:
        parts = ((file, self.part(file)) for file in files)
        return sum(file.size - min(file.size, part.stat().st_size if part.exists() else 0) for file, part in parts)

    def bytes_free(self) -> int:
        existing = next(path for path in (self.state, *self.state.parents) if path.exists())
        return shutil.disk_usage(existing).free


class _Progress:
    """One bar over all bytes, on stderr, and lines above it. Threads share it, which tqdm alone does not allow for."""

    def __init__(self, show: bool, verb: str, total: int, done: int = 0) -> None:
        pause = 0.3 if sys.stderr.isatty() else 30  # a log file wants a line now and then, not an animation
        self._bar = tqdm(desc=verb, total=total, initial=done, disable=not show, unit="B", unit_scale=True, mininterval=pause)
        self._lock = threading.Lock()

    def update(self, size: int) -> None:
        with self._lock:
            self._bar.update(size)

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def _say(line: str) -> None:
    tqdm.write(line, file=sys.stderr)


class _StartOver(Exception):
    """The server does not continue this file where we stopped: its beginning is fetched again too."""


class _Stopped(Exception):
    """Another file's failure, or Ctrl-C, ends this transfer. Its bytes are on disk."""


class _Hub:
    """One repository on a Hub: its listing and its bytes. Waits out what passes, and names what does not."""

    def __init__(self, repo_id: str, revision: str | None, endpoint: str | None, patience: Patience, say: Callable) -> None:
        self.repo_id, self.revision = repo_id, revision or constants.DEFAULT_REVISION
        self.endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        self.source = f"{repo_id}@{self.revision}"
        self.commit = self.revision  # until the listing pins it
        self.stop = threading.Event()
        self._say, self._patience = say, patience
        self._stall_s = patience.stall_s or constants.HF_HUB_DOWNLOAD_TIMEOUT
        self._xet: Any = None
        self._use_xet = not constants.HF_HUB_DISABLE_XET

    def patiently(self, what: str, action: Callable[[], T]) -> T:
        for tries in itertools.count(1):
            try:
                return action()
            except (*TRANSIENT, hub_errors.HfHubHTTPError, httpx2.HTTPError, httpx2.InvalidURL, ValueError) as error:
                self.wait_out(what, error, tries)
        raise AssertionError("unreachable")

    def wait_out(self, what: str, error: Exception | None, tries: int) -> None:
        """Sleep until another try makes sense, or raise the error that a user can act on. None: closed too early."""
        status = error.response.status_code if isinstance(error, hub_errors.HfHubHTTPError) else None
        if not (error is None or isinstance(error, TRANSIENT) or status in TRANSIENT_STATUS):
            raise self._explain(what, error) from error
        wait = min(self._patience.wait_s * 2 ** (tries - 1), 30.0)
        if isinstance(error, hub_errors.HfHubHTTPError):
            asked = error.response.headers.get("Retry-After", "")
            wait = max(wait, float(asked)) if asked.isdigit() else wait
        if tries >= self._patience.tries or wait > LONGEST_WAIT_S:
            raise self._explain(what, error) from error
        self._say(f"{what}: {_reason(error)}; trying again in {wait:.3g} s ({tries + 1} of {self._patience.tries})")
        if self.stop.wait(wait):
            raise _Stopped

    def _explain(self, what: str, error: Exception | None) -> WanError:
        login = "run `hf auth login` or set HF_TOKEN, with a token of an account that may read it"
        status = error.response.status_code if isinstance(error, hub_errors.HfHubHTTPError) else None
        if isinstance(error, hub_errors.GatedRepoError):
            hint = f"accept its terms at {self.endpoint}/{self.repo_id}, then {login}"
            return RequestError(f"{self.repo_id} is gated: the Hub wants to know who you are ({status})", hint)
        if isinstance(error, hub_errors.RevisionNotFoundError):
            return RequestError(f"{self.repo_id} has no revision {self.revision!r} (404)")
        if isinstance(error, hub_errors.EntryNotFoundError):
            return RequestError(f"{what}: {self.repo_id} does not have this file (404)")
        if isinstance(error, hub_errors.RepositoryNotFoundError) or status == 404:
            known = ", ".join(SHORT_NAMES)
            hint = f"check the name (short names: {known}); if it is private, {login}"
            return RequestError(f"{self.repo_id} does not exist on {self.endpoint}, or is private ({status})", hint)
        if status in (401, 403):
            return RequestError(f"{self.repo_id}: {self.endpoint} refuses access ({status})", login)
        hint = "what came is kept: run the same command again and it goes on from there"
        if status == 429:
            hint = f"wait some minutes; {hint}; being logged in (`hf auth login`) raises the limit"
        return RunError(f"{what}: {self.endpoint}: {_reason(error)}, {self._patience.tries} times in a row", hint)

    def listing(self) -> list[KnownFile]:
        """All files of the repository at its revision, which is pinned to a commit from now on."""
        api = HfApi(endpoint=self.endpoint, library_name="wan22")
        info = self.patiently(
            f"listing {self.source}",
            lambda: api.model_info(self.repo_id, revision=self.revision, files_metadata=True, timeout=self._stall_s),
        )
        self.commit = info.sha or self.revision
        files = []
        for entry in info.siblings or []:
            path = verify.safe_path(entry.rfilename, self.repo_id)
            if entry.lfs:
                files.append(KnownFile(path, entry.lfs.size, entry.lfs.sha256, blob=entry.lfs.sha256))
            elif entry.size is not None and entry.blob_id:
                files.append(KnownFile(path, entry.size, entry.blob_id, "git", entry.blob_id))
            else:
                raise RunError(f"{self.endpoint} tells neither size nor hash of {self.repo_id}/{path}")
        return files

    def chunks(self, file: KnownFile, offset: int) -> Iterator[bytes]:
        """The bytes of `file` from `offset` on, as they come; may end too early.

        Raises _StartOver, _XetFailed, and for `wait_out` what httpx2 and huggingface_hub raise.
        """
        url = hf_hub_url(self.repo_id, file.path, revision=self.commit, endpoint=self.endpoint)
        headers = build_hf_headers(library_name="wan22", headers={"Accept-Encoding": "identity"})
        if self.use_xet and file.kind == "sha256":
            known = get_hf_file_metadata(url, timeout=self._stall_s, headers=headers, endpoint=self.endpoint)
            if known.xet_file_data:
                yield from self._xet_chunks(known.xet_file_data, headers, file.size, offset)
                return
        if offset:
            headers["Range"] = f"bytes={offset}-"
        with get_session().stream("GET", url, headers=headers, timeout=self._stall_s, follow_redirects=True) as response:
            if offset and response.status_code in (200, 416):
                raise _StartOver
            hf_raise_for_status(response)
            yield from response.iter_raw()

    def _xet_chunks(self, xet: XetFileData, headers: dict[str, str], size: int, offset: int) -> Iterator[bytes]:
        """The same out of xet storage: many connections a file. hf_xet retries by itself; then, _XetFailed."""
        try:
            with self._xet_lock:
                if self._xet is None:
                    self._xet = self._open_xet(xet.refresh_route, headers)
            for chunk in self._xet.download_stream(hf_xet.XetFileInfo(xet.file_hash, size), start=offset):
                offset += len(chunk)
                yield chunk
        except (OSError, ValueError, RuntimeError, KeyError, httpx2.HTTPError) as error:
            raise _XetFailed(_reason(error)) from error
        if offset < size:  # some failures end the stream without an exception
            raise _XetFailed("the stream ended early")

    def _open_xet(self, refresh_route: str, headers: dict[str, str]) -> Any:
        response = get_session().get(refresh_route, headers=headers, timeout=self._stall_s)
        hf_raise_for_status(response)
        access = response.json()
        # By default hf_xet bears six minutes with storage that a firewall hides; plain HTTP is tried sooner here.
        limits = {"client.connect_timeout": f"{self._stall_s:.0f}s", "client.retry_max_duration": "30s"}
        return hf_xet.XetSession(hf_xet.XetConfig().with_config(limits)).new_download_stream_group(
            endpoint=access["casUrl"],
            token=access["accessToken"],
            token_expiry_unix_secs=access["exp"],
            token_refresh_url=refresh_route,
            token_refresh_headers=headers,
            custom_headers={key: value for key, value in headers.items() if key.lower() != "authorization"},
        )

    def halt(self) -> None:
        """End the transfers under way, at their next chunk."""
        self.stop.set()
        if self._xet is not None:
            self._xet.abort()


def _reason(error: Exception | None) -> str:
    """An exception in a few words, on one line."""
    if error is None:
        return "the connection closed before the end of the file"
    if isinstance(error, hub_errors.HfHubHTTPError):
        return f"HTTP {error.response.status_code}"
    if isinstance(error, httpx2.TimeoutException):
        return "no answer in time" if isinstance(error, httpx2.ConnectTimeout) else "the connection stalled"
    return next(iter(str(error).splitlines()), "") or type(error).__name__
