"""What a batch is to make: a file of prompts, a table, or a folder of earlier videos → requests with definite seeds.

| source     | an item is                                                                                    |
|------------|-----------------------------------------------------------------------------------------------|
| `*.txt`    | a line: a prompt, then flags (`it's a cat --seed 7 --size 480p`); `#` begins a line of comment |
| `*.jsonl`  | a line: an object of `generate`'s flags or a request's fields                                 |
| `*.csv`    | a row under a header of such names                                                            |
| a folder   | a video (or sheet, `.json`) that wan22 made, to be made again                                 |

Without a seed an item gets one that follows from its content, so that the same file is always the same videos.
"""

import contextlib
import csv
import dataclasses
import functools
import io
import json
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wan22.checkpoint import Checkpoint
from wan22.config import Encoding, Precision, Request, RequestError, WanError, digest
from wan22.options import Base, Flags, make_request, read_any_record, read_request

Parse = Callable[[list[str]], dict[str, Any]]  # words of a command line → the flags given; raises what it likes

RECORDED = (".mp4", ".gif", ".png", ".json")
FLAG = re.compile(r"(?:^|\s)(?=--[A-Za-z])")
QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"(?=\s+--[A-Za-z]|\s*$)')  # all of it: a prompt may begin with a quotation


@dataclass(frozen=True)
class Item:
    """A request, its seed definite, and where it stands ("line 3", a file's name); of an earlier video, its record."""

    where: str
    request: Request
    record: dict[str, Any] | None = None


@dataclass(frozen=True)
class Bad:
    """What cannot be made, and why."""

    where: str
    error: str


@dataclass(frozen=True)
class _Entry:
    where: str
    flags: dict[str, Any]
    fields: dict[str, Any]
    record: dict[str, Any] | None = None


def read_items(
    source: Path, flags: Flags, base: Base, checkpoint: Checkpoint, parse: Parse, *, seeds: list[int], repeat: int
) -> tuple[list[Item], list[Bad]]:
    """All items in order, and what is wrong with the others. flags and base: what counts where an item says nothing.

    seeds: each item without one of its own is made with each of these; repeat: or so often. Raises RequestError where
    there is no such source, or nothing in it.
    """
    items: list[Item] = []
    bad: list[Bad] = []
    seen: Counter[str] = Counter()
    for entry in _entries(source, parse):
        if isinstance(entry, Bad):
            bad.append(entry)
            continue
        try:
            request = make_request({**read_request({**flags, **entry.flags}, base), **entry.fields}, checkpoint)
        except (WanError, TypeError) as error:
            bad.append(Bad(entry.where, str(error)))
            continue
        items += [Item(entry.where, one, entry.record) for one in _seeded(request, seeds, repeat, seen)]
    if not items and not bad:
        raise RequestError(f"{source}: there is nothing in it to make")
    return list({item.request: item for item in reversed(items)}.values())[::-1], bad  # the first of those alike


def recorded_base(folder: Path, base: Base) -> Base:
    """A base with what earlier videos were made with, as far as all of a folder agree: their precision, down to the
    attention backend (`auto` might take another), their encoding, and the demo."""
    found: dict[str, list[Any]] = {"precision": [], "encoding": [], "model": []}
    for path in _videos(folder):
        with contextlib.suppress(RequestError):
            record = read_any_record(str(path))
            if isinstance(record.get("request"), dict):
                for part, values in found.items():
                    if record.get(part) not in values:
                        values.append(record.get(part))
    alike = {part: values[0] for part, values in found.items() if len(values) == 1 and values[0]}
    with contextlib.suppress(RequestError, TypeError, KeyError):
        base = replace(base, precision=Precision.from_dict(alike["precision"]).to_dict())
    with contextlib.suppress(RequestError, TypeError, KeyError):
        base = replace(base, encoding=Encoding.from_dict(alike["encoding"]).to_dict())
    return replace(base, model="demo") if alike.get("model") == "demo" else base


def _seeded(request: Request, seeds: list[int], repeat: int, seen: Counter[str]) -> Iterator[Request]:
    if request.seed is not None:
        yield from (replace(request, seed=request.seed + number) for number in range(repeat))
        return
    if seeds:
        yield from (replace(request, seed=seed) for seed in seeds)
        return
    content = digest(request.to_dict())
    for _ in range(repeat):
        yield replace(request, seed=int(digest({"content": content, "number": seen[content]})[:8], 16))
        seen[content] += 1  # the same line twice is two videos


def parse_seeds(text: str) -> list[int]:
    """`1..8`, `1,2,5`, `1..3,9` → whole numbers. Raises RequestError."""
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,18})(?:\.\.(\d{1,18}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < first + 100_000:
            raise RequestError(f"--seeds {text}: not a list of seeds", hint="say 1..8, or 1,2,5")
        seeds += range(first, last + 1)
    return list(dict.fromkeys(seeds))


# --- sources ---------------------------------------------------------------------------------------------------------
def _entries(source: Path, parse: Parse) -> Iterator[_Entry | Bad]:
    if source.is_dir():
        return _from_folder(source)
    readers = {".txt": _from_text, ".jsonl": _from_json_lines, ".csv": _from_csv}
    if source.suffix.lower() not in readers:
        raise RequestError(f"{source}: not a batch", hint=f"known: {', '.join(readers)}, or a folder of videos")
    try:
        data = source.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise RequestError(f"{source}: cannot be read: {error.strerror or error}") from None
    return readers[source.suffix.lower()](source, data, parse)


def _lines(data: bytes) -> Iterator[tuple[str, str | Bad]]:
    """Numbered lines that are not empty; one that is not UTF-8 spoils no other."""
    for number, line in enumerate(data.split(b"\n"), 1):
        where = f"line {number}"
        try:
            if text := line.decode().strip():
                yield where, text
        except UnicodeDecodeError:
            yield where, Bad(where, "it is not UTF-8")


def _from_text(source: Path, data: bytes, parse: Parse) -> Iterator[_Entry | Bad]:
    for where, line in _lines(data):
        if isinstance(line, Bad):
            yield line
        elif not line.startswith("#"):
            yield _parsed(where, functools.partial(_words, line), {}, parse)


def _words(line: str) -> list[str]:
    prompt, flags = split_line(line)
    return [f"--prompt={prompt}", *flags]


def split_line(line: str) -> tuple[str, list[str]]:
    """A prompt and the words of the flags behind it. In the prompt quotes and apostrophes are letters like others,
    unless one pair of `"` encloses all of it. Raises ValueError."""
    if match := QUOTED.match(line):
        return re.sub(r"\\(.)", r"\1", match[1]), shlex.split(line[match.end() :])
    start = match.end() if (match := FLAG.search(line)) else len(line)
    return line[:start].strip(), shlex.split(line[start:])


def _from_json_lines(source: Path, data: bytes, parse: Parse) -> Iterator[_Entry | Bad]:
    for where, line in _lines(data):
        if isinstance(line, Bad):
            yield line
            continue
        try:
            table = json.loads(line)
        except (ValueError, RecursionError):
            table = None
        yield _from_table(where, table, parse) if isinstance(table, dict) else Bad(where, "it is not a JSON object")


def _from_csv(source: Path, data: bytes, parse: Parse) -> Iterator[_Entry | Bad]:
    try:
        rows = list(csv.reader(io.StringIO(data.decode(), newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise RequestError(f"{source}: not a table: {error}") from None
    if not rows or "prompt" not in rows[0]:
        raise RequestError(f"{source}: its first row names no column prompt", hint="say: prompt,seed,size")
    if twice := [name for name, count in Counter(filter(None, rows[0])).items() if count > 1]:
        raise RequestError(f"{source}: its first row names {twice[0]!r} twice")
    for number, row in enumerate(rows[1:], 2):
        if len(row) > len(rows[0]):
            yield Bad(f"row {number}", f"it has {len(row)} cells, the header {len(rows[0])}")
        elif any(row):
            yield _from_table(f"row {number}", {k: v for k, v in zip(rows[0], row, strict=False) if v}, parse)


_FIELDS = {field.name: field.type for field in dataclasses.fields(Request)} | {"boundary": float}


def _from_table(where: str, table: dict[str, Any], parse: Parse) -> _Entry | Bad:
    """Names that only a request has are its fields; all others are flags."""
    fields: dict[str, Any] = {}
    words: list[str] = []
    for name, value in table.items():
        if value is None:
            continue
        if name in ("width", "height", "num_frames", "num_steps", "guidance_high", "boundary", "loras"):
            try:
                fields[name] = _FIELDS[name](value) if isinstance(value, str) else value  # type: ignore[operator]
            except (ValueError, TypeError):
                return Bad(where, f"{name}: {value!r} is not a number")
            continue
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, bool | dict | list):
                return Bad(where, f"{name}: {one!r} is no value for it")
            words.append(f"--{name.strip().replace('_', '-')}={one}")
    return _parsed(where, lambda: words, fields, parse)


def _parsed(where: str, words: Callable[[], list[str]], fields: dict[str, Any], parse: Parse) -> _Entry | Bad:
    try:
        return _Entry(where, parse(words()), fields)
    except Exception as error:  # whatever the command line's library raises; an item's error never stops the others
        return Bad(where, error.format_message() if hasattr(error, "format_message") else str(error))


def _from_folder(folder: Path) -> Iterator[_Entry | Bad]:
    for path in _videos(folder):
        try:
            record = read_any_record(str(path))
            request = Request.from_dict(record["request"], path.name)
            yield _Entry(path.name, {}, request.to_dict() | {"loras": request.loras}, record)
        except (RequestError, KeyError, TypeError) as error:
            if path.suffix.lower() == ".mp4":  # pictures and tables may well be something else
                yield Bad(path.name, str(error))


def _videos(folder: Path) -> Iterable[Path]:
    paths = sorted(folder.iterdir())
    return [path for path in paths if path.suffix.lower() in RECORDED and not path.name.startswith(".")]
