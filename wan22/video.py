"""Frames → a file with the record of its making inside, and back.

`open_output` picks a writer by the name it is given:

| output              | frames                           | record                                              |
|---------------------|----------------------------------|-----------------------------------------------------|
| `NAME.mp4`          | H.264, encoded as chunks come    | the container's `comment` tag                       |
| `NAME.gif`          | one palette for the whole video  | a comment extension                                 |
| `NAME.png`          | a sheet of them (sheet.py)       | an iTXt chunk, keyword `Comment`                    |
| `NAME/`, no suffix  | `00000.png`, `00001.png` …       | `record.json`                                       |

Each makes its file in a hidden folder beside the target and moves it there when it is whole, so that what has the target's
name is always a whole file. The record is stored as the JSON text `{"wan22": record, "fps": fps}`, the same bytes in all four.
Reading a record needs the standard library only. `F` pixel frames, `H W` pixels.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO, Literal, Self

from .config import RequestError, RunError
from .names import LONGEST_NAME, next_free

if TYPE_CHECKING:
    import numpy as np

IfExists = Literal["error", "number", "replace"]  # a target that exists: refuse, take the next free number, replace it

_CRF = 10  # what the published code's imageio `quality=8` comes to for libx264: int((1 - 0.8) * 51)
_THREADS = 4  # fixed: x264's output depends on how many there are, and the same video should be the same bytes everywhere
_RECORD_LIMIT = 16 << 20  # bytes; a record is some kilobytes, more is not ours
_BOX_LIMIT = 10_000  # boxes or chunks walked at one level before a file is called damaged
_DISK_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
_FRAME_NAME = re.compile(r"\d{5,}\.png")
_RECORD_NAME = "record.json"


# Writing ----------------------------------------------------------------------------------------------------------------


def open_output(
    path: str | Path, *, width: int, height: int, fps: float, record: dict[str, Any], if_exists: IfExists = "error"
) -> VideoWriter:
    """The writer for a path: a context manager that takes frames by `.write()` and has its final `.path` afterwards.

        with open_output("sunset.mp4", width=1280, height=720, fps=16, record=record) as output:
            for frames in chunks:  # uint8 [F, H, W, 3]
                output.write(frames)

    Leaving it whole publishes the file; leaving it by any exception leaves nothing. Raises RequestError for a name of
    no known kind, RunError (from all three steps) for what goes wrong in writing: a full disk, an ffmpeg that dies.
    """
    return _writer(path)(path, width=width, height=height, fps=fps, record=record, if_exists=if_exists)


def check_writable(path: str | Path, *, if_exists: IfExists = "error") -> None:
    """RequestError, before any work is done, where `open_output` could not write. Leaves nothing behind, no folder either."""
    target, kind = Path(path), _writer(path)
    if issubclass(kind, _Mp4Writer):
        _ffmpeg()
    try:
        exists = os.path.lexists(target) and not (kind is _FolderWriter and _is_empty_folder(target))
        folder = target.absolute().parent
        while not os.path.lexists(folder):  # raises for names that are too long or have characters that cannot be
            folder = folder.parent
        # Permission bits do not tell (root ignores them, read-only and network file systems have their own mind): try.
        with tempfile.TemporaryFile(dir=folder):
            pass
        target.with_name(target.name[:1] + target.name[1:]).is_dir()
        os.lstat(target) if exists else None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise RequestError(f"cannot write {target}: {reason}", hint="name another with --output") from None


class VideoWriter:
    ...
