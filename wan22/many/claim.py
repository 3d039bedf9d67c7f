"""Who is at work on what: a claim is a small hidden file, made by the one process that gets it. Standard library only.

It holds who made it (host, process id, when the process began) and its time is renewed while the work goes on. On the
same host a claim falls with its process; another host's falls when it was not renewed for a while.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BEAT = 10.0  # seconds between two renewals
STALE = 120.0  # seconds without one, until a claim of another host counts for nothing


class Claim:
    """A claim that is held. Let go of it with `release`; a process that dies holds it no longer."""

    def __init__(self, path: Path, text: str) -> None:
        self.path, self._text = path, text
        self._stop = threading.Event()
        threading.Thread(target=self._renew, daemon=True).start()

    def release(self) -> None:
        self._stop.set()
        with contextlib.suppress(OSError):
            if self.path.read_text() == self._text:  # not what another made of it while we were thought dead
                self.path.unlink()

    def _renew(self) -> None:
        while not self._stop.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(self.path)


def take(path: Path) -> Claim | None:
    """The claim at `path` (its folder exists); None where a living process holds it. Raises OSError."""
    me = {"host": _host(), "pid": os.getpid(), "began": _began(os.getpid()), "token": secrets.token_hex(8)}
    text = json.dumps(me)
    with _alone_in(path.parent):
        if (there := _read(path)) is not None and (_lives(path, there) or not _put_away(path, there)):
            return None
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return None
        try:
            with open(handle, "w") as file:
                file.write(text)
        except OSError:  # a full disk: an empty claim would keep all others waiting
            path.unlink(missing_ok=True)
            raise
    return Claim(path, text)


def holder(path: Path) -> str | None:
    """Who lives and holds the claim at `path`: "process 123 on host"; None where nobody does."""
    text = _read(path)
    if text is None or not _lives(path, text):
        return None
    who = _parse(text)
    return f"process {who.get('pid', '?')} on {str(who.get('host', '?')).partition('/')[0]}"


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except FileNotFoundError:
        return None


def _parse(text: str) -> dict[str, Any]:
    try:
        who = json.loads(text)
    except ValueError:
        return {}  # just being written, or torn by a power cut
    return who if isinstance(who, dict) else {}


def _lives(path: Path, text: str) -> bool:
    who = _parse(text)
    if who.get("host") == _host():
        return _began(int(who.get("pid", 0))) == who.get("began")
    try:
        renewed = path.stat().st_mtime
    except FileNotFoundError:
        return False
    # An unreadable claim is one that is being written: it lives for moments only.
    return _now_in(path.parent) - renewed < (STALE if who else BEAT)


def _now_in(folder: Path) -> float:
    """The time by the clock that stamps files there, which over a network is not ours."""
    probe = folder / f".{secrets.token_hex(8)}.now"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        probe.unlink(missing_ok=True)


def _put_away(path: Path, text: str) -> bool:
    """Remove a dead claim; False where it is not there any more, or is another by now."""
    aside = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return True
    if _read(aside) == text:
        aside.unlink()
        return True
    with contextlib.suppress(OSError):
        os.link(aside, path)  # back to its owner, who was quicker than we
    aside.unlink()
    return False


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """One process at a time, as far as the file system can; elsewhere what follows is safe but for microseconds."""
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield
        return
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _host() -> str:
    """This host, and this container where there is one: process ids mean something only within."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return f"{socket.gethostname()}/{namespace}"


def _began(pid: int) -> float | None:
    """When a living process began (seconds since 1970), told apart from a later one of the same id; None if dead."""
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else round(process.create_time(), 1)
    except (psutil.Error, ValueError):
        return None
