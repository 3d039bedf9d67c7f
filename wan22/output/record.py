"""The record inside a finished file: how it is stored, and found again with the standard library alone.

It is the JSON text `{"wan22": record, "fps": fps}`, the same bytes in every kind of file: an mp4's `comment` tag, a
GIF's comment extension, a PNG's iTXt chunk `Comment`, a folder's `record.json`, a `.json` file itself (which may be the
record alone, as `wan22 show` prints it). Files come from anywhere, so no length in one is believed unchecked.
"""

import json
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from wan22.config import RequestError

RECORD_NAME = "record.json"  # in a folder of frames
_LONGEST = 16 << 20  # bytes; a record is some kilobytes
_MOST_BLOCKS = 10_000  # boxes, chunks or blocks in a row, before a file counts as damaged


def to_text(record: dict[str, Any], fps: float) -> str:
    """A record (plain values) as it is stored: one line, no control characters, encodable in UTF-8."""
    text = json.dumps({"wan22": record, "fps": fps}, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # Half a surrogate pair comes from an argument that was not UTF-8. JSON can say it, UTF-8 cannot.
    return re.sub("[\ud800-\udfff]", lambda half: f"\\u{ord(half[0]):04x}", text)


def read_record(path: str | Path) -> dict[str, Any]:
    """The record in a file or folder that wan22 made, known by its content, whatever its name. Raises RequestError."""
    return read_document(path)["wan22"]


def read_document(path: str | Path) -> dict[str, Any]:
    """All that is stored: `{"wan22": record, "fps": …}`. Raises RequestError."""
    try:
        text = stored_text(Path(path))
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise RequestError(f"{path}: damaged, or not whole: {error}") from None
    try:
        document = json.loads(text or "")
    except (ValueError, RecursionError):
        document = None
    if isinstance(document, dict) and isinstance(document.get("request"), dict):  # the record alone
        document = {"wan22": document, "fps": document["request"].get("fps")}
    ours = isinstance(document, dict) and isinstance(document.get("wan22"), dict)
    if not ours or not isinstance(document.get("fps"), int | float):
        raise RequestError(f"{path}: there is no record of wan22 in it")
    return document


def stored_text(path: Path) -> str | None:
    """The text of the comment in an mp4, GIF, PNG or folder; None if none. Raises OSError, ValueError if damaged."""
    if path.is_dir():
        path = path / RECORD_NAME
        if not path.exists():
            return None
        with open(path, "rb") as file:
            return _payload(file, 0, os.path.getsize(path)).decode()
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(12)
        if start[4:8] == b"ftyp":
            data = _mp4_comment(file, size)
        elif start[:4] == b"GIF8":
            data = _gif_comment(file)
        elif start[:8] == b"\x89PNG\r\n\x1a\n":
            data = _png_comment(file, size)
        elif path.suffix.lower() == ".json":
            data = _payload(file, 0, size)
        else:
            data = None
    return None if data is None else data.decode()


def _payload(file: BinaryIO, start: int, end: int) -> bytes:
    if end - start > _LONGEST:
        raise ValueError(f"a comment of {end - start} bytes")
    file.seek(start)
    return file.read(end - start)


def _boxes(file: BinaryIO, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """(kind, start, end) of the content of each MP4 box between two offsets (ISO 14496-12, 4.2)."""
    for _ in range(_MOST_BLOCKS):
        if end - start < 8:  # some writers close a list with a zero
            return
        file.seek(start)
        size, kind, large = struct.unpack(">I4sQ", file.read(16).ljust(16, b"\0"))
        content = start + (16 if size == 1 else 8)
        size = {0: end - start, 1: large}.get(size, size)
        if start + size > end or start + size < content:
            raise ValueError(f"a box of {size} bytes where {end - start} are left")
        yield kind, content, start + size
        start += size
    raise ValueError("too many boxes")


def _mp4_comment(file: BinaryIO, size: int) -> bytes | None:
    """The iTunes-style comment tag. Walks all top boxes first, so that a file cut short is told from a whole one."""
    boxes = list(_boxes(file, 0, size))
    for kind, skip in ((b"moov", 0), (b"udta", 0), (b"meta", 4), (b"ilst", 0), (b"\xa9cmt", 0)):
        inside = next(((start + skip, end) for name, start, end in boxes if name == kind), None)
        if inside is None:
            return None
        boxes = list(_boxes(file, *inside))
    return next((_payload(file, start + 8, end) for name, start, end in boxes if name == b"data"), None)


def _gif_comment(file: BinaryIO) -> bytes | None:
    """The first comment extension ahead of the first picture."""
    file.seek(0)
    header = file.read(13).ljust(13, b"\0")
    file.seek(13 + (3 << (header[10] & 7) + 1 if header[10] & 0x80 else 0))  # behind the colour table
    for _ in range(_MOST_BLOCKS):
        introducer, label = file.read(1), file.read(1)
        if introducer != b"!":
            return None
        data = bytearray()
        while length := (file.read(1) or b"\xff")[0]:
            block = file.read(length)
            if len(block) < length or len(data) > _LONGEST:
                raise ValueError("a comment without an end")
            data += block
        if label == b"\xfe":
            return bytes(data)
    raise ValueError("too many blocks")


def _png_comment(file: BinaryIO, size: int) -> bytes | None:
    """The iTXt chunk with keyword `Comment`, not compressed (PNG specification, 11.3.3.4)."""
    start = 8
    for _ in range(_MOST_BLOCKS):
        if start == size:
            return None
        file.seek(start)
        header = file.read(8)
        if len(header) < 8:
            raise ValueError("it is cut short")
        length, kind = struct.unpack(">I4s", header)
        if start + 12 + length > size:
            raise ValueError(f"a chunk of {length} bytes where {size - start - 12} are left")
        if kind == b"iTXt":
            keyword, _, rest = _payload(file, start + 8, start + 8 + length).partition(b"\0")
            if keyword == b"Comment" and rest[:1] == b"\0":
                return rest[2:].split(b"\0", 2)[-1]  # behind language and translated keyword
        start += 12 + length
    raise ValueError("too many chunks")
