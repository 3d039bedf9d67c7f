"""Several processes that end together: one that dies, hangs or fails stops all, and its error is told once.

A process stuck in a message to another that is gone cannot be interrupted from inside, so each has a thread that talks
to one place (`Watchman`: in whoever started them, or in the first of them): a line of JSON a second, what it fails of,
and good-bye. A connection that ends without a good-bye is a death, silence a machine that is gone or stopped, and work
that stands still everywhere a hang of the one that is behind. Standard library only.

| what is seen                                   | after, seconds                                  |
|------------------------------------------------|-------------------------------------------------|
| a connection ends without a good-bye           | at once, and a moment for better news           |
| nothing is heard                               | SILENCE                                         |
| no process gets on, in a phase that should     | STANDSTILL, or three times the longest pause yet |
"""

import contextlib
import json
import os
import re
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from wan22.config import WanError, is_out_of_memory

BEAT = 1.0
SILENCE = 12.0
STANDSTILL = 20.0
COLD = 6  # times as long, the first time that kernels run
PROCESSOR_TICK = 2.0  # more than waiting and this watch use before a standstill is one
RESCUE = 6.0  # for the state to be saved, once all has stopped
# The best explanation first, and how long to wait for a better one, seconds.
GRACE = {"failed": 0.3, "died": 0.5, "lost": 1.0, "silent": 0.0, "hangs": 0.0, "stopped": 4.0, "cut off": 2.5}


# --- what a process says of itself -----------------------------------------------------------------------------------
class _Work:
    ticks = 0
    armed = 0
    cold = 0
    by_processor = False


def count_processor_time() -> None:
    """On a CPU, where one block may take minutes: who computes gets on, whether or not it says so."""
    _Work.by_processor = True


def tick() -> None:
    """Some work is done: called all along whatever takes long."""
    _Work.ticks += 1


@contextlib.contextmanager
def ticking() -> Iterator[None]:
    """In here, no `tick` for a while is a hang. Where any process is outside, none is suspected."""
    _Work.armed += 1
    tick()
    try:
        yield
    finally:
        _Work.armed -= 1


@contextlib.contextmanager
def first_time() -> Iterator[None]:
    """In here kernels may have to be compiled, and a pause of COLD times as long is none."""
    _Work.cold += 1
    try:
        yield
    finally:
        _Work.cold -= 1


@dataclass(frozen=True)
class News:
    """What became of a process: `kind` is a key of GRACE; `line` and `hints` are what is to be told, `code` the exit
    code that all end with."""

    kind: str
    rank: int
    line: str
    hints: tuple[str, ...] = ()
    code: int = 1

    @property
    def order(self) -> tuple[int, int]:
        return list(GRACE).index(self.kind), self.rank


class Member:
    """A process's thread that talks to the watchman. On its word the process ends, whatever its main thread is at."""

    def __init__(self, rank: int, address: tuple[str, int], token: str) -> None:
        """Raises OSError where there is nobody at the address."""
        self.rank, self._token = rank, token
        self.rescue: Callable[[], Iterable[str]] | None = None  # saves what can be, and says where; any thread's
        self._socket = socket.create_connection(address, timeout=20)
        self._sending = threading.Lock()
        self._ended = threading.Event()
        self._say({})
        threading.Thread(target=self._run, daemon=True, name="watch").start()

    def fail(self, news: News) -> int:
        """Tell of an error, and wait for the end that comes of it; the exit code, should it not come."""
        with contextlib.suppress(ValueError):  # not the main thread
            for number in (signal.SIGINT, signal.SIGTERM):  # it ends, and once is enough
                signal.signal(number, signal.SIG_IGN)
        with contextlib.suppress(OSError):
            self._say({"news": vars(news)})
            time.sleep(15)  # in which the other thread saves what can be, and ends the process
        return news.code

    def leave(self) -> None:
        """All is well, and this process is done."""
        self._ended.set()
        with contextlib.suppress(OSError):
            self._say({"bye": True})

    def _say(self, table: dict[str, Any]) -> None:
        ticks = _Work.ticks + (int(time.process_time() / PROCESSOR_TICK) if _Work.by_processor else 0)
        table |= {"token": self._token, "rank": self.rank, "ticks": ticks, "armed": _Work.armed > 0,
                  "cold": _Work.cold > 0, "pid": os.getpid()}  # fmt: skip
        with self._sending:
            self._socket.sendall(json.dumps(table).encode() + b"\n")

    def _run(self) -> None:
        self._socket.settimeout(BEAT)
        heard = b""
        while not self._ended.is_set():
            try:
                more = self._socket.recv(1 << 16)
            except TimeoutError:
                with contextlib.suppress(OSError):
                    self._say({})
                continue
            except OSError:
                more = b""
            heard += more
            if heard.endswith(b"\n"):
                self._end(json.loads(heard)["code"], told=True)
            if not more and not self._ended.is_set():
                self._end(1, told=False)

    def _end(self, code: int, told: bool) -> None:
        self._ended.set()
        if not told and self.rank < 2:  # the watchman, who would have told, is no more
            print("error: the process that watched over the others died", file=sys.stderr, flush=True)
        if self.rescue:
            saving = threading.Thread(target=self._save, args=(self.rescue,), daemon=True)
            saving.start()
            saving.join(RESCUE)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    @staticmethod
    def _save(rescue: Callable[[], Iterable[str]]) -> None:
        for note in rescue():
            print(f"hint: {note}", file=sys.stderr, flush=True)


# --- who listens -----------------------------------------------------------------------------------------------------
@dataclass
class _Seen:
    """A process as the watchman knows it."""

    heard: float
    ticks: int = 0
    armed: bool = False
    cold: bool = False
    since: float = 0.0  # when its ticks last changed
    longest: float = 0.0  # pause between changes, while armed
    gone: bool = False
    pid: int = 0


class Watchman:
    """Listens to `count` processes in a thread, and ends them all for the first that does not go on.

    tell: what is done with the verdict, once, before the others hear of it; by default it is printed.
    """

    def __init__(self, count: int, host: str = "", tell: Callable[[News], None] | None = None) -> None:
        self.token = secrets.token_hex(8)
        self.verdict: News | None = None
        self.ended = threading.Event()  # there is a verdict, and everyone has been told
        self._count, self._tell = count, tell or announce
        self._seen: dict[int, _Seen] = {}
        self._news: list[tuple[float, News]] = []
        self._lock = threading.Lock()
        self._closed = False
        self._server = socket.create_server((host, 0), backlog=max(count, 16))
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ)
        self._open: dict[socket.socket, tuple[bytes, int | None]] = {}
        threading.Thread(target=self._run, daemon=True, name="watchman").start()

    @property
    def port(self) -> int:
        return int(self._server.getsockname()[1])

    def hear(self, news: News) -> None:
        """News from elsewhere, of whoever started a process."""
        with self._lock:
            self._news.append((time.monotonic(), news))

    def close(self) -> None:
        """Watch no more, and tell nothing: whoever has not said good-bye ends by itself."""
        self._closed = True

    def _run(self) -> None:
        while self.verdict is None:
            if self._closed:
                for thing in (*self._open, self._server):
                    thing.close()
                return
            for key, _ in self._selector.select(BEAT / 4):
                if key.fileobj is self._server:
                    connection = self._server.accept()[0]
                    self._open[connection] = b"", None
                    self._selector.register(connection, selectors.EVENT_READ)
                else:
                    self._receive(key.fileobj)  # type: ignore[arg-type]
            self._judge()
        self._tell(self.verdict)
        said = json.dumps({"code": self.verdict.code}).encode() + b"\n"
        for connection in self._open:
            with contextlib.suppress(OSError):
                connection.sendall(said)
        self.ended.set()

    def _receive(self, connection: socket.socket) -> None:
        heard, rank = self._open[connection]
        try:
            more = connection.recv(1 << 16)
        except OSError:
            more = b""
        *lines, rest = (heard + more).split(b"\n")
        for line in lines:
            rank = self._hear_line(line, rank)
        self._open[connection] = rest, rank
        if not more or (rank is None and len(rest) > 1 << 16):
            self._selector.unregister(connection)
            del self._open[connection]
            connection.close()
            if rank is not None and not self._seen[rank].gone:
                self.hear(News("lost", rank, f"rank {rank} died (process {self._seen[rank].pid})"))

    def _hear_line(self, line: bytes, rank: int | None) -> int | None:
        try:
            table = json.loads(line)
            if table["token"] != self.token:
                return rank
            rank, now = int(table["rank"]), time.monotonic()
            seen = self._seen.setdefault(rank, _Seen(now, since=now))
            if table["ticks"] != seen.ticks or not table["armed"]:
                if seen.armed and table["armed"] and not seen.cold:
                    seen.longest = max(seen.longest, now - seen.since)
                seen.since = now
            seen.heard, seen.ticks, seen.armed, seen.pid = now, table["ticks"], table["armed"], table["pid"]
            seen.cold = table["cold"]
            seen.gone = seen.gone or "bye" in table
            if "news" in table:
                self.hear(News(**{**table["news"], "hints": tuple(table["news"]["hints"])}))
        except (ValueError, KeyError, TypeError):
            pass  # somebody else's
        return rank

    def _judge(self) -> None:
        now = time.monotonic()
        here = {rank: seen for rank, seen in self._seen.items() if not seen.gone}
        for rank, seen in here.items():
            if now - seen.heard > SILENCE:
                self.hear(News("silent", rank, f"rank {rank} does not answer any more (process {seen.pid})"))
        patience = max([STANDSTILL, *(3 * seen.longest for seen in here.values())])
        patience *= COLD if any(seen.cold for seen in here.values()) else 1
        latest = max((seen.since for seen in self._seen.values()), default=now)  # of those who are done, too
        armed = len(self._seen) == self._count and here and all(seen.armed for seen in here.values())
        if armed and now - latest > patience:
            behind = min(here, key=lambda rank: here[rank].ticks)
            line = f"rank {behind} hangs: nothing has gone on for {patience:.0f} s (process {here[behind].pid})"
            self.hear(News("hangs", behind, line))
        with self._lock:
            if any(now - when >= self._grace(news) for when, news in self._news):
                self.verdict = min((news for _, news in self._news), key=lambda news: news.order)

    @staticmethod
    def _grace(news: News) -> float:
        return 0.3 if news.kind == "stopped" and news.rank == 0 else GRACE[news.kind]


def of_another(error: BaseException) -> bool:
    """Whether an error may be what comes of another process's end, and says nothing of its cause."""
    own = isinstance(error, WanError) or is_out_of_memory(error)
    return not own and bool(re.search(r"gloo|NCCL|[Cc]onnection|peer|process group|pipe", str(error)))


def announce(news: News) -> None:
    """One line on stderr, and its hints."""
    print(("" if news.kind == "stopped" else "error: ") + news.line, file=sys.stderr)
    for hint in news.hints:
        print(f"hint: {hint}", file=sys.stderr)
    sys.stderr.flush()
