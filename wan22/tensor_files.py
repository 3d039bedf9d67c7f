"""Files of tensors, read lazily and strictly: safetensors shards with their index, and weights-only pickles.

Headers are parsed and checked with the standard library alone, so that a missing, truncated or foreign file is told
before torch is imported. Tensors are read by plain positioned reads through small buffers, cast on the way: host
memory holds the result and the buffers, never a shard, and nothing stays mapped.
"""

import json
import math
import os
import threading
import zipfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from wan22.config import RequestError

if TYPE_CHECKING:
    import torch

ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
              "F8_E4M3": 1, "F8_E5M2": 1}  # fmt: skip
MAX_HEADER = 100 << 20  # bytes; the limit of the safetensors format itself
BUFFER_BYTES = 16 << 20
READERS = 4
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: `nbytes` bytes at `offset` of `path`, `dtype` in safetensors' words."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class TensorSource(Protocol):
    """Tensors by name, from wherever they lie."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def read(self, targets: "Mapping[str, torch.Tensor]") -> None:
        """Fill every target with the tensor of its name, cast to the target's dtype, on the target's device."""


def open_checked(path: Path) -> int:
    """Size in bytes of a file that exists, can be read and is not a Git LFS pointer. Raises RequestError."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(len(LFS_POINTER))
    except FileNotFoundError:
        raise RequestError(f"{path}: no such file", hint="fetch it: wan22 download --ckpt_dir FOLDER") from None
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror}") from None
    if start == LFS_POINTER:
        raise RequestError(f"{path}: a Git LFS pointer, not the file itself", hint="run: git lfs pull")
    return size


def read_header(path: Path) -> tuple[dict[str, Entry], bytes]:
    """A safetensors file's tensors and its raw header; sizes and offsets checked against the file's own size.

    Raises RequestError for a missing, truncated or malformed file. Source: the safetensors format, "Format" section.
    """
    size = open_checked(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > MAX_HEADER or 8 + length > size:
            told = f"its header claims {length:,} bytes, the file has {size:,}"
            raise RequestError(f"{path}: not a safetensors file, or truncated ({told})")
        raw = file.read(length)
    try:
        table: dict[str, Any] = json.loads(raw)
        table.pop("__metadata__", None)
        entries, end = {}, 0
        for name, item in table.items():
            start, stop = item["data_offsets"]
            entry = Entry(path, item["dtype"], tuple(item["shape"]), 8 + length + start, stop - start)
            if entry.nbytes != math.prod(entry.shape) * ITEM_BYTES[entry.dtype] or start < 0:
                raise ValueError(f"tensor {name} has {entry.nbytes} bytes for {entry.dtype} {list(entry.shape)}")
            entries[name], end = entry, max(end, stop)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RequestError(f"{path}: broken safetensors header: {error}") from None
    if 8 + length + end > size:
        raise RequestError(
            f"{path}: truncated: {size:,} of {8 + length + end:,} bytes", hint="fetch it again: wan22 download"
        )
    return entries, raw


def _read_index(path: Path) -> dict[str, str]:
    open_checked(path)
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RequestError(f"{path}: not an index of shards: {error!r}") from None
    for file in names.values():
        if Path(file).name != file or file in ("", ".", ".."):
            raise RequestError(f"{path}: names a file outside its folder: {file!r}")
    return names


class Safetensors:
    """Tensors of one safetensors file, or of a folder's shards through their index. Opening reads headers only."""

    def __init__(self, path: Path) -> None:
        """path: a .safetensors file, or a .safetensors.index.json whose shards lie beside it. Raises RequestError."""
        self.path = path
        self.headers: dict[Path, bytes] = {}
        self.entries: dict[str, Entry] = {}
        index = _read_index(path) if path.name.endswith(".json") else None
        for shard in sorted({path.parent / name for name in index.values()} if index is not None else {path}):
            entries, self.headers[shard] = read_header(shard)
            if index is not None:
                for name in entries:
                    if index.get(name) != shard.name:
                        raise RequestError(f"{shard}: holds {name}, which {path.name} does not place there")
            self.entries.update(entries)
        for name, file in (index or {}).items():
            if name not in self.entries:
                raise RequestError(f"{path}: names {name} in {file}, which that shard does not hold")

    @property
    def files(self) -> list[Path]:
        return [*self.headers, *([self.path] if self.path not in self.headers else [])]

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self.entries.items()}

    def read(self, targets: "Mapping[str, torch.Tensor]") -> None:
        """Fill the targets in file order by a few threads; each holds one buffer of 16 MiB. Raises RequestError."""
        import torch

        dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
                  "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
                  "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}  # fmt: skip
        local = threading.local()

        def read_piece(entry: Entry, target: torch.Tensor, start: int, count: int) -> None:
            if not hasattr(local, "buffer"):
                local.buffer = bytearray(BUFFER_BYTES)
            item = ITEM_BYTES[entry.dtype]
            view = memoryview(local.buffer)[: count * item]
            with open(entry.path, "rb", buffering=0) as file:
                file.seek(entry.offset + start * item)
                done = 0
                while done < len(view):
                    if not (read := file.readinto(view[done:])):
                        raise RequestError(f"{entry.path}: ended while it was read; was it replaced meanwhile?")
                    done += read
            piece = torch.frombuffer(local.buffer, dtype=dtypes[entry.dtype], count=count)
            target.view(-1)[start : start + count].copy_(piece)

        pieces: list[tuple[Entry, torch.Tensor, int, int]] = []
        for name in sorted(targets, key=lambda name: (self.entries[name].path, self.entries[name].offset)):
            entry, target = self.entries[name], targets[name]
            step = BUFFER_BYTES // ITEM_BYTES[entry.dtype]
            pieces.extend((entry, target, at, min(step, target.numel() - at)) for at in range(0, target.numel(), step))
        with ThreadPoolExecutor(READERS) as pool:
            for _ in pool.map(lambda piece: read_piece(*piece), pieces):
                pass


class Pickle:
    """Tensors of a .pth file, unpickled with weights only and memory-mapped where the format allows it."""

    def __init__(self, path: Path) -> None:
        """Only checks that the file is there and whole; its table is read with the first question. Raises RequestError."""
        self.path, self.files = path, [path]
        size = open_checked(path)
        with open(path, "rb") as file:
            # A zip's directory is its end: a truncated one is no zip any more.
            looks_zip = file.read(2) == b"PK"
        if size == 0 or (looks_zip and not zipfile.is_zipfile(path)):
            raise RequestError(f"{path}: truncated ({size:,} bytes)", hint="fetch it again: wan22 download")

    @cached_property
    def tensors(self) -> "dict[str, torch.Tensor]":
        import pickle

        import torch

        try:
            table = torch.load(self.path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(self.path))
        except pickle.UnpicklingError:
            raise RequestError(
                f"{self.path}: not plain tensors: a pickle that asks for code is never run",
                hint="take the file from its publisher, or a .safetensors form of it",
            ) from None
        except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
            raise RequestError(f"{self.path}: cannot be read: {str(error).splitlines()[0]}") from None
        if not isinstance(table, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in table.values()):
            raise RequestError(f"{self.path}: not a table of tensors")
        return dict(table)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def read(self, targets: "Mapping[str, torch.Tensor]") -> None:
        for name, target in targets.items():
            target.copy_(self.tensors[name])


def check_names(source_name: str, found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Names and shapes must be the wanted ones exactly: none missing, none over, none of another shape."""

    def few(names: Iterable[str]) -> str:
        names = sorted(names)
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

    if missing := wanted.keys() - found.keys():
        raise RequestError(f"{source_name}: misses {few(missing)}")
    if extra := found.keys() - wanted.keys():
        raise RequestError(f"{source_name}: holds unknown tensors: {few(extra)}")
    for name, shape in wanted.items():
        if tuple(found[name]) != tuple(shape):
            raise RequestError(f"{source_name}: {name} has shape {list(found[name])}, expected {list(shape)}")


def sample_bytes(path: Path, pieces: int = 16, length: int = 4096) -> bytes:
    """Evenly spaced pieces of a file, its start and end among them: enough to tell two checkpoints apart."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        taken = []
        for i in range(pieces):
            file.seek(max(0, size - length) * i // (pieces - 1))
            taken.append(file.read(length))
    return b"".join(taken)
