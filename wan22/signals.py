"""Signals that end a program, as an exception where it is at work, so that what it holds is kept."""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

STOPPED = {130: "interrupted", 143: "terminated"}
UNREAD = 141  # SIGPIPE: nobody reads stdout any more
AGAIN = 0.02  # seconds, in which the code that a signal should not stop, or that swallowed it, comes to its end
IMPORTS = "<frozen importlib._bootstrap>"


def stop(signum: int, frame: FrameType | None) -> None:
    """A handler. Not KeyboardInterrupt, of which typer would keep the number alone. An import ends first: cut off in
    it, libraries in C++ end the process with words of their own, and others go on without a part of themselves."""
    while frame:
        if frame.f_code.co_filename == IMPORTS:
            return _come_again(signum)
        frame = frame.f_back
    raise SystemExit(128 + signum)


def _come_again(signum: int) -> None:
    again = threading.Timer(AGAIN, os.kill, (os.getpid(), signum))
    again.daemon = True
    again.start()


@contextlib.contextmanager
def never_swallowed() -> Any:
    """In here, a signal that comes while a `__del__` is at work, which swallows all exceptions, comes again."""
    before = sys.unraisablehook

    def heard(unraisable: Any) -> None:
        if isinstance(unraisable.exc_value, SystemExit) and unraisable.exc_value.code in STOPPED:
            _come_again(int(unraisable.exc_value.code) - 128)
        else:
            before(unraisable)

    sys.unraisablehook = heard
    try:
        yield
    finally:
        sys.unraisablehook = before


@contextlib.contextmanager
def ending_at_once(tell: bool) -> Iterator[None]:
    """In here, where nothing is to be kept yet, a signal ends the process although its main thread waits in a library
    that never comes back to Python, and so to `stop`. tell: in a line on stderr. In another thread than the main one,
    to which signals come, nothing is different."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)  # Python's C code writes numbers there

    def listen() -> None:
        for (number,) in iter(lambda: ours.recv(1), b""):
            if signal.getsignal(number) is stop:
                if tell:
                    print(STOPPED[128 + number], file=sys.stderr, flush=True)
                os._exit(128 + number)

    threading.Thread(target=listen, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        theirs.close()
