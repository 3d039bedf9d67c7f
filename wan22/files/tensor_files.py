"""Files of tensors, read lazily and strictly: safetensors shards with their index, and weights-only pickles.

Headers are parsed and checked with the standard library alone, so that a missing, truncated or foreign file is told
before torch is imported. Where the bytes go is reading.py's.
"""

import json
import math
import os
import threading
import zipfile
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from wan22.config import RequestError
from wan22.files import reading
from wan22.files.reading import ITEM_BYTES, Entry, Job

if TYPE_CHECKING:
    import torch

MAX_HEADER = 100 << 20  # bytes; the limit of the safetensors format itself
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
FETCH_HINT = "fetch it: wan22 download --ckpt_dir FOLDER"


class MissingFiles(RequestError):
    """Files that are not there; several are named in one line."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self.paths = list(dict.fromkeys(paths))
        if len(self.paths) == 1:
            said = f"{self.paths[0]}: no such file"
        else:
            folder = Path(os.path.commonpath([path.parent.absolute() for path in self.paths]))
            names = (path.absolute().relative_to(folder).as_posix() for path in self.paths)
            said = f"{folder}: no such files: {', '.join(names)}"
        super().__init__(said, hint=FETCH_HINT)


class TensorSource(Protocol):
    """Tensors by name, from wherever they lie.

    path: what messages name; files: all that is read; shapes and dtypes (safetensors' words, or a GGML type's name) by
    tensor; sizes: stored bytes by tensor; metadata: the file's own, texts and numbers.
    """

    @property
    def path(self) -> Path: ...

    @property
    def files(self) -> list[Path]: ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    @property
    def dtypes(self) -> Mapping[str, str]: ...

    @property
    def sizes(self) -> Mapping[str, int]: ...

    @property
    def metadata(self) -> Mapping[str, Any]: ...

    def read(self, targets: "Mapping[str, torch.Tensor]", begins: Mapping[str, int] | None = None) -> None:
        """Fill every target with the tensor of its name, cast to the target's dtype, on the target's device. begins:
        of tensors that are wanted in part, the number, counted in their flat order, that the target begins with."""

    def warm(self, stop: threading.Event) -> None:
        """Have the system read the files ahead, till `stop` is set; there should be room for them in its page cache."""


def open_checked(path: Path) -> int:
    """Size in bytes of a file that exists, can be read and is not a Git LFS pointer. Raises RequestError."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(len(LFS_POINTER))
    except FileNotFoundError:
        raise MissingFiles([path]) from None
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
        if not isinstance(table.pop("__metadata__", None) or {}, dict):
            raise ValueError("its metadata is no table")
        entries, end = {}, 0
        for name, item in table.items():
            start, stop = item["data_offsets"]
            if (item_bytes := ITEM_BYTES.get(item["dtype"])) is None:
                raise ValueError(f"tensor {name} is of a type that is not known here, {item['dtype']!r}")
            entry = Entry(path, item["dtype"], tuple(item["shape"]), 8 + length + start, stop - start, (1, item_bytes))
            counts = all(type(n) is int and n >= 0 for n in entry.shape)
            if not counts or entry.nbytes != math.prod(entry.shape) * item_bytes or start < 0:
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


class FileTensors:
    """Tensors that lie in files as plain or packed numbers: what Safetensors and GGUF files have in common."""

    path: Path
    headers: dict[Path, bytes]
    entries: dict[str, Entry]
    metadata: dict[str, Any]

    @property
    def files(self) -> list[Path]:
        return [*self.headers, *([self.path] if self.path not in self.headers else [])]

    @property
    def each_metadata(self) -> list[dict[str, Any]]:
        """That of each file, where several have their own under one key."""
        return [self.metadata]

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self.entries.items()}

    @cached_property
    def dtypes(self) -> dict[str, str]:
        return {name: entry.dtype for name, entry in self.entries.items()}

    @cached_property
    def sizes(self) -> dict[str, int]:
        return {name: entry.nbytes for name, entry in self.entries.items()}

    def read(
        self, targets: "Mapping[str, torch.Tensor]", begins: Mapping[str, int] | None = None,
        scales: "Mapping[str, torch.Tensor] | None" = None,
    ) -> None:  # fmt: skip
        """Fill the targets, in file order; tensors with scales (float32: one, or one a row) are multiplied by them
        before they are cast. Raises RequestError."""
        scales, begins, jobs = scales or {}, begins or {}, []
        for name, target in targets.items():
            entry, scale = self.entries[name], scales.get(name)
            if name in begins:
                begin, row = begins[name], math.prod(entry.shape[1:])
                entry = entry.part(begin, target.numel())
                if scale is not None and scale.numel() > 1:
                    scale = scale.flatten()[begin // row : (begin + target.numel()) // row]
            jobs.append(Job(entry, target, scale))
        reading.read_entries(jobs)

    def bytes_of(self, name: str) -> bytes:
        """A small tensor as it lies in its file."""
        entry = self.entries[name]
        with open(entry.path, "rb") as file:
            file.seek(entry.offset)
            return file.read(entry.nbytes)

    def warm(self, stop: threading.Event) -> None:
        reading.warm(self.headers, stop)


class Safetensors(FileTensors):
    """Tensors of one safetensors file, or of a folder's shards through their index. Opening reads headers only."""

    def __init__(self, path: Path) -> None:
        """path: a .safetensors file, or a .safetensors.index.json whose shards lie beside it. Raises RequestError."""
        self.path = path
        self.headers, self.entries, self.metadata = {}, {}, {}
        index = _read_index(path) if path.name.endswith(".json") else None
        shards = sorted({path.parent / name for name in index.values()} if index is not None else {path})
        if missing := [shard for shard in shards if not shard.exists()]:
            raise MissingFiles(missing)
        for shard in shards:
            entries, self.headers[shard] = read_header(shard)
            if index is not None:
                for name in entries:
                    if index.get(name) != shard.name:
                        raise RequestError(f"{shard}: holds {name}, which {path.name} does not place there")
            self.entries.update(entries)
        for metadata in self.each_metadata:
            self.metadata |= metadata
        for name, file in (index or {}).items():
            if name not in self.entries:
                raise RequestError(f"{path}: names {name} in {file}, which that shard does not hold")

    @property
    def each_metadata(self) -> list[dict[str, Any]]:
        return [json.loads(header).get("__metadata__") or {} for header in self.headers.values()]


class Pickle:
    """Tensors of a .pth file, unpickled with weights only and memory-mapped where the format allows it."""

    def __init__(self, path: Path) -> None:
        """Checks that the file is there and whole; its table is read with the first question. Raises RequestError."""
        self.path, self.files = path, [path]
        self.metadata: dict[str, Any] = {}
        self.each_metadata: list[dict[str, Any]] = []
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

    @cached_property
    def dtypes(self) -> dict[str, str]:
        words = {dtype: word for word, dtype in reading.torch_dtypes().items()}
        return {name: words.get(tensor.dtype, str(tensor.dtype)) for name, tensor in self.tensors.items()}

    @cached_property
    def sizes(self) -> dict[str, int]:
        return {name: tensor.nbytes for name, tensor in self.tensors.items()}

    def read(self, targets: "Mapping[str, torch.Tensor]", begins: Mapping[str, int] | None = None) -> None:
        for name, target in targets.items():
            tensor = self.tensors[name]
            if begins and name in begins:
                tensor = tensor.flatten()[begins[name] :][: target.numel()].view_as(target)
            target.copy_(tensor)
            reading.tick()

    def warm(self, stop: threading.Event) -> None:
        reading.warm(self.files, stop)


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
