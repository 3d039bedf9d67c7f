"""A Hub on the loopback interface: what huggingface_hub 2.4 asks for, faults on demand, and a count of all it served.

    with FakeHub() as hub:
        hub.add("owner/name", {"config.json": b"{}", "model.safetensors": weights})
        hub.play("model.safetensors", Fault("drop", at=1000))       # the next request for it
        hub.play("model.safetensors", Fault("status", status=500), times=2)
        download("owner/name", endpoint=hub.url, ...)
        hub.bytes_served["model.safetensors"]

A file over 1 kB is served as the Hub serves one in LFS: named by its SHA-256, and by way of a redirect to a "CDN".
With `xet=FOLDER`, such files also lie in xet storage in that folder, which hf_xet itself writes and reads.
"""

import contextlib
import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
GOOD_TOKEN = "hf_good"
LFS_FROM = 1000  # bytes
API = "api"  # plays as a file's name: the listing of the repository


@dataclass(frozen=True)
class Fault:
    """What to do instead of serving well.

    kind: `status` (answer with `status` and `headers`), `drop` (close the connection after `at` bytes of the body),
    `short` (announce and send only `at` bytes of the file, as if that were all), `flip` (flip a bit of the byte `at`),
    `stall` (stop after `at` bytes for `seconds`, the connection open), `no_range` (answer a range with the whole),
    `page` (of the listing only: a page of HTML instead, as a hotel's network gives).
    """

    kind: str
    at: int = 0
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 30.0


def git_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repository:
    files: dict[str, bytes]
    gated: bool = False
    commit: str = COMMIT
    listed_as: dict[str, str] = field(default_factory=dict)  # path → the name that the listing gives it
    xet_hashes: dict[str, str] = field(default_factory=dict)

    def entry(self, path: str) -> dict[str, Any]:
        content = self.files[path]
        entry: dict[str, Any] = {"rfilename": self.listed_as.get(path, path), "size": len(content)}
        entry["blobId"] = git_blob(content)
        if len(content) > LFS_FROM:
            entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 135}
        return entry

    def etag(self, path: str) -> str:
        content = self.files[path]
        return hashlib.sha256(content).hexdigest() if len(content) > LFS_FROM else git_blob(content)


class FakeHub:
    """The server, on a free port of 127.0.0.1. pace: seconds slept before every 64 kB of a body."""

    def __init__(self, xet: Path | None = None) -> None:
        self.repos: dict[str, Repository] = {}
        self.requests: Counter[str] = Counter()  # path (or API) → requests with a body
        self.bytes_served: Counter[str] = Counter()  # path → bytes of its body sent
        self.ranges: dict[str, list[int]] = {}  # path → where its requests began
        self.log: list[str] = []  # "GET /owner/name/resolve/main/x"
        self.played: Counter[str] = Counter()  # kind → faults played
        self.pace = 0.0
        self.xet = xet
        self._faults: dict[str, list[Fault]] = {}
        self._sending = 0
        self._lock = threading.Lock()
        self.closing = threading.Event()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "FakeHub":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def add(self, repo_id: str, files: dict[str, bytes], **options: Any) -> Repository:
        self.repos[repo_id] = repo = Repository(files, **options)
        if self.xet:
            import hf_xet

            for path, content in files.items():
                if len(content) > LFS_FROM:
                    source = self.xet / "upload"
                    source.write_bytes(content)
                    with hf_xet.XetSession().new_upload_commit(endpoint=self.cas) as commit:
                        upload = commit.start_upload_file(str(source))
                    repo.xet_hashes[path] = upload.result().xet_info.hash
        return repo

    @property
    def cas(self) -> str:
        return f"local://{self.xet}"

    def play(self, path: str, fault: Fault, times: int = 1) -> None:
        """Play `fault` at the next `times` requests for `path`'s body (or for the listing: API)."""
        self._faults.setdefault(path, []).extend([fault] * times)

    def forget_faults(self) -> None:
        """Serve well from now on."""
        self._faults.clear()

    def next_fault(self, path: str) -> Fault | None:
        with self._lock:
            waiting = self._faults.get(path)
            if not waiting:
                return None
            self.played[waiting[0].kind] += 1
            return waiting.pop(0)

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        with self._lock:
            self._sending += 1
        try:
            yield
        finally:
            with self._lock:
                self._sending -= 1

    def wait_until_idle(self) -> None:
        """Until nothing is being sent any more, to clients that are gone included: then the counts stand still."""
        while self._sending:
            time.sleep(0.005)

    def count(self, path: str, sent: int) -> None:
        with self._lock:
            self.bytes_served[path] += sent

    def began(self, path: str, offset: int) -> None:
        with self._lock:
            self.requests[path] += 1
            self.ranges.setdefault(path, []).append(offset)


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def handle(self) -> None:
        with contextlib.suppress(ConnectionResetError):  # a client that was killed
            super().handle()

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.log.append(f"{self.command} {path}")
        try:
            if path.startswith("/api/models/"):
                self._api(path.removeprefix("/api/models/"))
            elif path.startswith("/cdn/"):
                repo_id, _, name = path.removeprefix("/cdn/").partition("/-/")
                assert "Authorization" not in self.headers, "the token went to the CDN"
                self._body(self.hub.repos[repo_id], name)
            elif "/resolve/" in path:
                repo_id, _, rest = path.strip("/").partition("/resolve/")
                self._resolve(repo_id, *rest.split("/", 1), with_body=with_body)
            else:
                self._error(404, "")
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _api(self, rest: str) -> None:
        parts = rest.split("/")
        repo_id, tail = "/".join(parts[:2]), parts[2:]
        if tail[:1] == ["xet-read-token"]:
            return self._json({"casUrl": self.hub.cas, "accessToken": "xet", "exp": int(time.time()) + 3600})
        self.hub.began(API, 0)
        if self._refused(repo_id, API, tail[1] if tail[:1] == ["revision"] else "main"):
            return None
        repo = self.hub.repos[repo_id]
        siblings = [repo.entry(name) for name in repo.files]
        return self._json({"id": repo_id, "sha": repo.commit, "siblings": siblings})

    def _resolve(self, repo_id: str, revision: str, name: str, with_body: bool) -> None:
        if with_body and self._refused(repo_id, name, revision):
            return
        repo = self.hub.repos.get(repo_id)
        if repo is None or name not in repo.files:
            return self._error(404, "EntryNotFound" if repo else "RepoNotFound")
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{repo.etag(name)}"'}
        if len(repo.files[name]) <= LFS_FROM:
            if not with_body:
                headers["Content-Length"] = str(len(repo.files[name]))
                return self._send(200, headers)
            return self._body(repo, name, headers)
        headers["X-Linked-Size"] = str(len(repo.files[name]))
        headers["X-Linked-Etag"] = headers["ETag"]
        headers["Location"] = f"http://localhost:{self.server.server_address[1]}/cdn/{repo_id}/-/{name}"
        if name in repo.xet_hashes:
            headers["X-Xet-Hash"] = repo.xet_hashes[name]
            headers["X-Xet-Refresh-Route"] = f"{self.hub.url}/api/models/{repo_id}/xet-read-token/{COMMIT}"
        return self._send(302, {**headers, "Content-Length": "0"})

    def _refused(self, repo_id: str, name: str, revision: str) -> bool:
        """Answer with an error where there is one to play or to give."""
        waiting = self.hub._faults.get(name)
        if waiting and waiting[0].kind == "status":
            fault = self.hub.next_fault(name)
            assert fault
            self._error(fault.status, "", fault.headers)
            return True
        if waiting and name == API:
            fault = self.hub.next_fault(name)
            assert fault
            if fault.kind == "page":
                page = b"<html>Welcome to our hotel</html>"
                self._send(200, {"Content-Type": "text/html", "Content-Length": str(len(page))})
                self.wfile.write(page)
                return True
            assert fault.kind == "stall"
            self.hub.closing.wait(fault.seconds)
            self.close_connection = True
            return True
        repo = self.hub.repos.get(repo_id)
        signed_in = self.headers.get("Authorization") == f"Bearer {GOOD_TOKEN}"
        if repo is None:
            self._error(404 if signed_in else 401, "RepoNotFound")
        elif revision not in ("main", COMMIT):
            self._error(404, "RevisionNotFound")
        elif repo.gated and not signed_in:
            self._error(403 if "Authorization" in self.headers else 401, "GatedRepo")
        else:
            return False
        return True

    def _body(self, repo: Repository, name: str, headers: dict[str, str] | None = None) -> None:
        content = repo.files[name]
        fault = self.hub.next_fault(name) or Fault("none")
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.hub.began(name, start)
        if fault.kind == "no_range":
            start = 0
        if fault.kind == "short":
            content = content[: fault.at]
        if start >= len(content) > 0:
            return self._send(416, {"Content-Range": f"bytes */{len(content)}", "Content-Length": "0"})
        if fault.kind == "flip":
            content = content[: fault.at] + bytes([content[fault.at] ^ 1]) + content[fault.at + 1 :]
        body = content[start:]
        headers = {**(headers or {}), "Content-Length": str(len(body)), "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._send(206 if start else 200, headers)
        last = fault.at if fault.kind in ("drop", "stall") else len(body)
        with self.hub.busy():
            for position in range(0, min(last, len(body)), 1 << 16):
                time.sleep(self.hub.pace)
                piece = body[position : min(position + (1 << 16), last)]
                self.hub.count(name, len(piece))  # before: whoever has the last byte may look at once
                try:
                    self.wfile.write(piece)
                except OSError:
                    self.hub.count(name, -len(piece))
                    raise
        if fault.kind == "stall":
            self.hub.closing.wait(fault.seconds)
        if fault.kind in ("drop", "stall"):
            self.close_connection = True
        return None

    def _json(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self._send(200, {"Content-Type": "application/json", "Content-Length": str(len(body))})
        self.wfile.write(body)

    def _error(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        named = {"X-Error-Code": code} if code else {}
        self._send(status, {**named, **(headers or {}), "Content-Length": "0"})

    def _send(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
