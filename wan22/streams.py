"""The three standard streams of the command line: closed, unread, full, or in an encoding that lacks letters."""

import codecs
import contextlib
import io
import json
import os
import sys
from collections.abc import Iterator

from wan22.config import RunError
from wan22.output.names import reason
from wan22.signals import UNREAD


def open_streams() -> None:
    """The three standard streams, whatever the program was started with. One that is closed leads nowhere: else the
    next file that is opened takes its number, and gets what a library prints. What stdout's encoding lacks is written
    as JSON escapes it, and a file's name that is no text byte for byte. Where stderr's reader has gone, the run has not
    failed."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8"))  # noqa: SIM115
    codecs.register_error("wan22", _as_json)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout = Stream(sys.stdout, "wan22")
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr = Stream(sys.stderr, "backslashreplace")


class Stream(io.TextIOWrapper):
    """stdout or stderr, from which on an error leads nowhere. Of stdout it ends the program: with UNREAD where it was a
    pipe whose reader has gone, as any program, else by RunError."""

    def __init__(self, plain: io.TextIOWrapper, errors: str) -> None:
        # PYTHONUNBUFFERED and -u say write_through instead of line_buffering; without it all lines came at the end.
        super().__init__(plain.buffer, plain.encoding, errors, line_buffering=plain.line_buffering,
                         write_through=plain.write_through)  # fmt: skip
        self._plain = plain  # which else would be closed, and the buffer with it

    def write(self, text: str) -> int:
        with self._leading_nowhere():
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with self._leading_nowhere():
            super().flush()

    @contextlib.contextmanager
    def _leading_nowhere(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())  # also what is still to be written
            os.close(nowhere)
            if self.fileno() == 1:
                if isinstance(error, BrokenPipeError):
                    raise SystemExit(UNREAD) from None
                raise RunError(f"stdout: could not be written: {reason(error)}") from None


def _as_json(error: UnicodeError) -> tuple[bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    raw = [bytes([ord(letter) - 0xDC00]) if "\udc80" <= letter <= "\udcff" else json.dumps(letter)[1:-1].encode()
           for letter in letters]  # fmt: skip
    return b"".join(raw), error.end
