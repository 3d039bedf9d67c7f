"""Signals that end a program, as an exception where it is at work, so that what it holds is kept."""

import contextlib
import os
import sys
import threading
from typing import Any, NoReturn

STOPPED = {130: "interrupted", 143: "terminated"}
AGAIN = 0.02  # seconds, in which the code that swallowed a signal comes to its end


def stop(signum: int, frame: object) -> NoReturn:
    """A handler. Not KeyboardInterrupt, of which typer would keep the number alone."""
    raise SystemExit(128 + signum)


@contextlib.contextmanager
def never_swallowed() -> Any:
    """In here, a signal that comes while a `__del__` is at work, which swallows all exceptions, comes again."""
    before = sys.unraisablehook

    def heard(unraisable: Any) -> None:
        if isinstance(unraisable.exc_value, SystemExit) and unraisable.exc_value.code in STOPPED:
            again = threading.Timer(AGAIN, os.kill, (os.getpid(), int(unraisable.exc_value.code) - 128))
            again.daemon = True
            again.start()
        else:
            before(unraisable)

    sys.unraisablehook = heard
    try:
        yield
    finally:
        sys.unraisablehook = before
