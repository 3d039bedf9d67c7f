"""One repository on a Hub: its listing and its bytes. Knows the network and nothing of disks.

What passes by itself (a dropped connection, silence, 429, 500) is waited out, with the server's own Retry-After; what
does not is named, in one line with a hint. huggingface_hub gives the session (HF_ENDPOINT, HF_TOKEN, proxies), the
listing and xet; the loop over the bytes is ours because its own throws partial files away when it stops.
"""

import itertools
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx2
from huggingface_hub import HfApi, constants, get_session, hf_hub_url
from huggingface_hub import errors as hub_errors
from huggingface_hub.file_download import get_hf_file_metadata
from huggingface_hub.utils import XetFileData, build_hf_headers, hf_raise_for_status, parse_ratelimit_headers

from wan22.config import RequestError, RunError, WanError
from wan22.network.target import GOING_ON
from wan22.network.verify import KnownFile, safe_path

try:
    import hf_xet
except ImportError:  # huggingface_hub installs it on the common processors only
    hf_xet = None  # type: ignore[assignment]

T = TypeVar("T")

TRANSIENT_STATUS = (408, 429, 500, 502, 503, 504)
TRANSIENT = (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError, httpx2.ProxyError)
LONGEST_WAIT_S = 600.0  # a server that asks for more patience than this is named instead


@dataclass(frozen=True)
class Patience:
    """How long to bear with a server.

    tries: in a row, without one new byte; wait_s: seconds before the second, doubled before each further one, up to 30;
    stall_s: seconds of silence that end a connection (None: HF_HUB_DOWNLOAD_TIMEOUT, by default 10).
    """

    tries: int = 5
    wait_s: float = 1.0
    stall_s: float | None = None


class XetFailed(Exception):
    """Xet storage cannot be read; the same bytes are there over plain HTTP."""


class Stopped(Exception):
    """`halt` was called: another file's failure, or Ctrl-C, ends this transfer too."""


class Hub:
    """A repository at a revision. say: takes the lines that tell of waiting. Safe to use from several threads."""

    def __init__(
        self, repo_id: str, revision: str | None, endpoint: str | None, patience: Patience, say: Callable[[str], object]
    ) -> None:
        self.repo_id = repo_id
        self.revision = revision or constants.DEFAULT_REVISION
        self.endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        self.commit: str | None = None  # until `listing` pins it
        self.use_xet = hf_xet is not None and not constants.HF_HUB_DISABLE_XET
        self._patience = patience
        self._stall_s = patience.stall_s or constants.HF_HUB_DOWNLOAD_TIMEOUT
        self.say = say
        self._stop = threading.Event()
        self._xet_lock = threading.Lock()
        self._xet: Any = None

    @property
    def source(self) -> str:
        return f"{self.repo_id}@{self.revision}"

    def listing(self) -> list[KnownFile]:
        """All files of the repository, whose revision is pinned to a commit from now on. Raises WanError."""
        api = HfApi(endpoint=self.endpoint, library_name="wan22")
        for tries in itertools.count(1):
            try:
                info = api.model_info(self.repo_id, revision=self.revision, files_metadata=True, timeout=self._stall_s)
                break
            except (httpx2.HTTPError, httpx2.InvalidURL, ValueError, KeyError, TypeError) as error:
                self.wait_out(f"listing {self.source}", error, tries)
        self.commit = _hex(info.sha or "", self.endpoint)
        files = []
        for entry in info.siblings or []:
            path = safe_path(entry.rfilename, self.repo_id)
            if entry.lfs:
                digest = _hex(entry.lfs.sha256, self.endpoint)
                files.append(KnownFile(path, entry.lfs.size, digest, blob=digest))
            elif entry.size is not None and entry.blob_id:
                digest = _hex(entry.blob_id, self.endpoint)
                files.append(KnownFile(path, entry.size, digest, "git", digest))
            else:
                raise RunError(f"{self.endpoint} tells neither size nor hash of {self.repo_id}/{path}")
        return files

    def chunks(self, file: KnownFile, offset: int) -> Iterator[bytes]:
        """The bytes of `file` from `offset` on, as they come; the last may not be the file's last.

        Raises XetFailed, Stopped, and, for `wait_out`, what httpx2 and huggingface_hub raise.
        """
        url = hf_hub_url(self.repo_id, file.path, revision=self.commit or self.revision, endpoint=self.endpoint)
        headers = build_hf_headers(library_name="wan22", headers={"Accept-Encoding": "identity"})
        xet = None
        if self.use_xet and file.kind == "sha256":
            metadata = get_hf_file_metadata(url, timeout=self._stall_s, headers=headers, endpoint=self.endpoint)
            xet = metadata.xet_file_data
        stream = self._xet_chunks(xet, headers, file.size, offset) if xet else self._http_chunks(url, headers, offset)
        for chunk in stream:
            yield chunk  # what came is used, whatever happens next
            if self._stop.is_set():
                raise Stopped

    def _http_chunks(self, url: str, headers: dict[str, str], offset: int) -> Iterator[bytes]:
        if offset:
            headers = {**headers, "Range": f"bytes={offset}-"}
        with get_session().stream("GET", url, headers=headers, timeout=self._stall_s) as response:  # follows redirects
            hf_raise_for_status(response)
            skip = offset if response.status_code == 200 else 0  # a server, or a proxy, that knows no ranges
            for chunk in response.iter_raw():  # as they come off the wire: what is held back, a kill would lose
                if skip < len(chunk):
                    yield chunk[skip:]
                skip = max(0, skip - len(chunk))

    def _xet_chunks(self, xet: XetFileData, headers: dict[str, str], size: int, offset: int) -> Iterator[bytes]:
        """The same out of xet storage, over many connections a file. hf_xet retries by itself before it fails."""
        try:
            with self._xet_lock:
                if self._xet is None:
                    self._xet = self._open_xet(xet.refresh_route, headers)
            for chunk in self._xet.download_stream(hf_xet.XetFileInfo(xet.file_hash, size), start=offset):
                offset += len(chunk)
                yield chunk
        except (OSError, ValueError, RuntimeError, KeyError, httpx2.HTTPError) as error:
            raise XetFailed(reason(error)) from error
        if offset < size:  # hf_xet ends some failed streams without an exception
            raise XetFailed("the stream ended early")

    def _open_xet(self, refresh_route: str, headers: dict[str, str]) -> Any:
        response = get_session().get(refresh_route, headers=headers, timeout=self._stall_s)
        hf_raise_for_status(response)
        access = response.json()
        # By itself hf_xet bears six minutes with storage that a firewall hides; plain HTTP is tried sooner here.
        limits = {
            "client.connect_timeout": f"{max(1, round(self._stall_s))}s",
            "client.read_timeout": f"{max(1, round(6 * self._stall_s))}s",
            "client.retry_max_duration": "30s",
        }
        return hf_xet.XetSession(hf_xet.XetConfig().with_config(limits)).new_download_stream_group(
            endpoint=access["casUrl"],
            token=access["accessToken"],
            token_expiry_unix_secs=access["exp"],
            token_refresh_url=refresh_route,
            token_refresh_headers=headers,
            custom_headers={key: value for key, value in headers.items() if key.lower() != "authorization"},
        )

    def halt(self) -> None:
        """End the transfers and waits that are under way."""
        self._stop.set()
        if self._xet is not None:
            self._xet.abort()

    def wait_out(self, what: str, error: Exception | None, tries: int) -> None:
        """Sleep until another try makes sense, or raise the WanError that a user can act on.

        error: None for a connection that closed too early; tries: so far, in a row. Raises Stopped after `halt`.
        """
        status = _status(error)
        if not (error is None or isinstance(error, TRANSIENT) or status in TRANSIENT_STATUS):
            raise self._explain(what, error, tries) from error
        wait = min(self._patience.wait_s * 2 ** (tries - 1), 30.0)
        if isinstance(error, hub_errors.HfHubHTTPError):
            wait = max(wait, _asked_wait(error))
        if tries >= self._patience.tries or wait > LONGEST_WAIT_S:
            raise self._explain(what, error, tries) from error
        self.say(f"{what}: {reason(error)}; trying again in {wait:.3g} s (try {tries + 1} of {self._patience.tries})")
        if self._stop.wait(wait):
            raise Stopped

    def _explain(self, what: str, error: Exception | None, tries: int) -> WanError:
        status = _status(error)
        login = "run `hf auth login` or set HF_TOKEN, with the token of an account that may read it"
        if isinstance(error, hub_errors.GatedRepoError):
            return RequestError(
                f"{self.repo_id} is gated: the Hub wants to know who downloads it ({status})",
                hint=f"accept its terms at {self.endpoint}/{self.repo_id}, then {login}",
            )
        if isinstance(error, hub_errors.HFValidationError):
            return RequestError(f"{self.source}: {reason(error)}")
        if isinstance(error, hub_errors.RevisionNotFoundError):
            return RequestError(f"{self.repo_id} has no revision {self.revision!r} ({status})")
        if isinstance(error, hub_errors.EntryNotFoundError):
            return RequestError(f"{what}: {self.source} does not have this file ({status})")
        if isinstance(error, hub_errors.RepositoryNotFoundError) or status == 404:
            return RequestError(
                f"{self.repo_id} does not exist on {self.endpoint}, or is private ({status})",
                hint=f"check the name; if it is private, {login}",
            )
        if status in (401, 403):
            return RequestError(f"{self.repo_id}: {self.endpoint} refuses access ({status})", hint=login)
        hint = GOING_ON
        if status == 429:
            hint = f"wait some minutes, or log in for a higher limit; {GOING_ON}"
        elif isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.ProxyError):
            hint = f"is there a network? HTTPS_PROXY names a proxy, HF_ENDPOINT a mirror; {GOING_ON}"
        often = f", {tries} times in a row" if tries > 1 else ""
        return RunError(f"{what}: {self.endpoint}: {reason(error)}{often}", hint=hint)


def _status(error: Exception | None) -> int | None:
    return error.response.status_code if isinstance(error, hub_errors.HfHubHTTPError) else None


def _asked_wait(error: hub_errors.HfHubHTTPError) -> float:
    """Seconds for which the server asks to be left alone, in either of the Hub's two ways; 0: it does not say."""
    limit = parse_ratelimit_headers(error.response.headers)
    if _status(error) == 429 and limit and limit.remaining == 0:
        return limit.reset_in_seconds + 1.0
    asked = error.response.headers.get("Retry-After", "")
    return float(asked) if asked.isdigit() else 0.0


def _hex(name: str, endpoint: str) -> str:
    """A commit or digest that the server sent: it becomes a file's name, so it must be one. Raises RunError."""
    if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", name):
        raise RunError(f"{endpoint} names a commit or hash {name!r}, which is none: is it a Hub?")
    return name


def reason(error: Exception | None) -> str:
    """An exception in a few words, on one line; None: a connection that closed too early."""
    if error is None:
        return "the connection closed before the end of the file"
    if isinstance(error, hub_errors.HfHubHTTPError):
        return "has less of the file than it lists (HTTP 416)" if _status(error) == 416 else f"HTTP {_status(error)}"
    if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout):
        return f"cannot be reached ({str(error) or 'no answer in time'})"
    if isinstance(error, httpx2.TimeoutException):
        return "the connection stalled"
    if isinstance(error, httpx2.RemoteProtocolError | httpx2.ReadError):
        return "the connection was dropped"
    line = next(iter(str(error).splitlines()), "") or type(error).__name__
    if isinstance(error, hub_errors.HFValidationError) or not isinstance(error, ValueError | KeyError | TypeError):
        return line
    return f"its answer is not a Hub's ({line})"
