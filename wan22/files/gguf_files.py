"""GGUF files: their header, read strictly; the numbers in them are unpacked by the gguf package.

The header is parsed here because the package's own reader takes 48 s over the tokenizer inside a umt5 file (a Python
object a token; this one: 0.1 s), and loops for ever over a header that lies about a count.

Source: the GGUF specification (ggml, `docs/gguf.md`); the conventions for models with tensors of more than four axes,
ComfyUI-GGUF's (`comfy.gguf.orig_shape.NAME` beside a tensor stored in another shape).
"""

import math
import mmap
import struct
from collections.abc import Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from wan22.config import RequestError
from wan22.files.reading import ITEM_BYTES, Entry
from wan22.files.tensor_files import FileTensors, open_checked

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
MAX_AXES = 8
MAX_KEPT = 64  # entries of an array in the metadata: shapes are kept, vocabularies are not
MAX_COUNT = 1 << 20  # tensors, keys
MAX_NAME = 1024  # bytes of a tensor's name; GGML itself takes 64


class _Cursor:
    """Reads on through a file's bytes; whatever leads outside of them is a struct.error."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def number(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return value

    def count(self, what: str, most: int = MAX_COUNT) -> int:
        if (value := self.number("<Q")) > most:
            raise ValueError(f"{value:,} {what}")
        return value

    def text(self, what: str = "bytes of text", most: int | None = None) -> str:
        length = self.count(what, len(self.data) if most is None else most)
        self.at += length
        return str(self.data[self.at - length : self.at], "utf-8", "replace")

    def value(self, kind: int) -> Any:
        """A value of the metadata; None for a long array, which is skipped."""
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            return self.number(SCALARS[kind])
        item, length = self.number("<I"), self.count("entries of an array", len(self.data))
        if length <= MAX_KEPT:
            return [self.value(item) for _ in range(length)]
        if item == STRING:
            for _ in range(length):
                self.at += 8 + struct.unpack_from("<Q", self.data, self.at)[0]
        else:
            self.at += length * struct.calcsize(SCALARS[item])
        return None


class Gguf(FileTensors):
    """Tensors of one GGUF file. Opening reads its header only."""

    def __init__(self, path: Path) -> None:
        """Raises RequestError for a missing, truncated or malformed file."""
        self.path = path
        size = open_checked(path)
        try:
            with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                self._parse(data)
                end = max((entry.offset + entry.nbytes for entry in self.entries.values()), default=0)
                self.headers = {path: data[: self.start]}
        except struct.error:
            raise RequestError(f"{path}: broken GGUF header, or truncated: it leads out of the file") from None
        except (ValueError, KeyError, IndexError, OverflowError, RecursionError) as error:
            raise RequestError(f"{path}: broken GGUF header, or truncated: {error}") from None
        if end > size:
            raise RequestError(f"{path}: truncated: {size:,} of {end:,} bytes", hint="fetch it again: wan22 download")

    @cached_property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", "unknown"))

    def _parse(self, data: mmap.mmap) -> None:
        cursor = _Cursor(data)
        if data[:4] != MAGIC:
            raise ValueError("it does not begin with GGUF")
        cursor.at = 4
        if (version := cursor.number("<I")) not in VERSIONS:
            raise ValueError(f"version {version}; known: {', '.join(map(str, VERSIONS))}")
        tensors, keys = cursor.count("tensors"), cursor.count("keys")
        self.metadata = {}
        for _ in range(keys):
            key = cursor.text()
            self.metadata[key] = cursor.value(cursor.number("<I"))
        told = []
        for _ in range(tensors):  # GGML counts axes from the fastest
            name, axes = cursor.text("bytes of a tensor's name", MAX_NAME), cursor.number("<I")
            if axes > MAX_AXES:
                raise ValueError(f"tensor {name} has {axes} axes")
            shape = tuple(cursor.count("elements", 1 << 48) for _ in range(axes))
            told.append((name, shape[::-1], cursor.number("<I"), cursor.number("<Q")))
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"alignment {alignment!r}")
        self.start = -(-cursor.at // alignment) * alignment
        self.entries = {
            name: _entry(self.path, name, shape, kind, self.start + offset, self.metadata)
            for name, shape, kind, offset in told
        }
        if len(self.entries) != len(told):
            raise ValueError("two tensors have one name")


def _entry(
    path: Path, name: str, shape: tuple[int, ...], kind: int, offset: int, metadata: Mapping[str, Any]
) -> Entry:
    """A tensor's place; raises ValueError for a type that is unknown or cannot be unpacked."""
    dtype, elements, size = _type(kind)
    count = math.prod(shape)
    if count % elements:
        raise ValueError(f"tensor {name} {list(shape)} is not made of whole {dtype} blocks")
    original = metadata.get(f"{ORIGINAL_SHAPE}{name}", shape)
    if not isinstance(original, list | tuple) or math.prod(original) != count:
        raise ValueError(f"tensor {name} {list(shape)} cannot have the original shape {original}")
    return Entry(path, dtype, tuple(original), offset, count // elements * size, (elements, size))


@cache
def _type(kind: int) -> tuple[str, int, int]:
    """A GGML type's name, and the elements and bytes of its blocks; raises ValueError for one that cannot be read."""
    import gguf
    import numpy as np

    dtype = gguf.GGMLQuantizationType(kind)
    elements, size = gguf.GGML_QUANT_SIZES[dtype]
    if dtype.name not in ITEM_BYTES:
        try:
            gguf.quants.dequantize(np.zeros((1, size), np.uint8), dtype)
        except NotImplementedError:
            raise ValueError(f"type {dtype.name}, which the gguf package cannot unpack") from None
    return dtype.name, elements, size
