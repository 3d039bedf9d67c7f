"""Getting tensors out of files as fast as the disk gives them: read once, in order, by a few threads, through buffers.

A tensor that needs no change is read straight into its place. Any other goes through a small buffer (on a GPU: two
pinned ones a thread, copied on the thread's own stream while the next piece is read), is scaled or dequantized there,
and cast into its place: host memory holds the result and the buffers, never a file, and nothing stays mapped.
"""

import contextlib
import math
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from wan22.config import RequestError
from wan22.watch import tick

if TYPE_CHECKING:
    import torch

ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
              "F8_E4M3": 1, "F8_E5M2": 1}  # fmt: skip
READERS = 4
BUFFER_BYTES = 4 << 20  # a thread; 16 MiB measured no faster, and from 4 MiB the cast still finds half in the cache
DECODED_ELEMENTS = 1 << 18  # a piece of GGML blocks: unpacking makes several float32 arrays of this length
WARM_BYTES = 64 << 20


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: `nbytes` bytes at `offset` of `path`. `dtype` in safetensors' words or a GGML type's name.

    `block`: elements and bytes that can only be read together; one element where nothing is packed.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    block: tuple[int, int]

    @property
    def is_packed(self) -> bool:
        return self.dtype not in ITEM_BYTES

    def part(self, begin: int, count: int) -> "Entry":
        """`count` of its numbers from the one at `begin` on, at whole blocks; its shape is whole rows where they are
        that."""
        (elements, size), row = self.block, math.prod(self.shape[1:])
        assert begin % elements == count % elements == 0, "a part of a block cannot be read"
        shape = (count // row, *self.shape[1:]) if begin % row == count % row == 0 else (count,)
        return replace(self, shape=shape, offset=self.offset + begin // elements * size,
                       nbytes=count // elements * size)  # fmt: skip


class Job(NamedTuple):
    """One tensor to read: its place in a file, its target (contiguous, any dtype and device), and, where the stored
    numbers are to be multiplied, float32 scales: one, or one a row (the first axis), on the target's device."""

    entry: Entry
    target: "torch.Tensor"
    scale: "torch.Tensor | None" = None

    @property
    def row(self) -> int:
        """Elements that share a scale, where there is one a row; else 1."""
        return 1 if self.scale is None or self.scale.numel() == 1 else math.prod(self.entry.shape[1:])


class _Piece(NamedTuple):
    job: Job
    start: int  # in elements
    length: int


@cache
def torch_dtypes() -> "dict[str, torch.dtype]":
    """torch's dtype for each of safetensors' words."""
    import torch

    return {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
            "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
            "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}  # fmt: skip


def read_entries(jobs: Sequence[Job]) -> None:
    """Fill every target, each cast to its dtype. Raises RequestError for a file that changed since it was opened."""
    jobs = sorted(jobs, key=lambda job: (job.entry.path, job.entry.offset))
    if not (pieces := list(_pieces(jobs))):
        return
    # Unpacking is arithmetic, and the processor's limit; the rest is the disk's.
    most = max(READERS, min(16, os.cpu_count() or 1)) if any(job.entry.is_packed for job in jobs) else READERS
    left, lock, stop = iter(pieces), threading.Lock(), threading.Event()

    def work(lane: _Lane) -> None:
        with contextlib.closing(lane):
            while not stop.is_set():
                with lock:
                    piece = next(left, None)
                if piece is None:
                    return
                lane.read(piece)
                tick()

    lanes = [_Lane(jobs[0].target.device) for _ in range(min(most, len(pieces)))]
    with ThreadPoolExecutor(len(lanes)) as pool:
        working = [pool.submit(work, lane) for lane in lanes]
        try:
            for future in working:
                future.result()
        finally:  # one failed, or Ctrl-C: the others stop after the piece they are at
            stop.set()


def _pieces(jobs: Iterable[Job]) -> Iterator[_Piece]:
    """The jobs cut into what fits a buffer, at whole blocks and, where rows have scales of their own, at whole rows."""
    for job in jobs:
        block_elements, block_bytes = job.entry.block
        grain = max(block_elements, job.row)
        fitting = BUFFER_BYTES // block_bytes * block_elements
        if job.entry.is_packed:
            fitting = min(fitting, DECODED_ELEMENTS)
        step = max(1, fitting // grain) * grain
        total = job.target.numel()
        yield from (_Piece(job, start, min(step, total - start)) for start in range(0, total, step))


class _Lane:
    """What one thread reads with: an open file, its buffers, and on a GPU a stream of its own."""

    def __init__(self, device: "torch.device") -> None:
        import torch

        self.stream: Any = None
        self.turn = 0
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)
            # The targets' memory may still be in use by work queued before.
            self.stream.wait_stream(torch.cuda.current_stream(device))
            self.copied = [torch.cuda.Event(), torch.cuda.Event()]
        self.buffers = [
            torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=self.stream is not None)
            for _ in range(1 if self.stream is None else 2)
        ]
        self.file: FileIO | None = None

    def close(self) -> None:
        if self.file:
            self.file.close()
        if self.stream is not None:
            self.stream.synchronize()

    def read(self, piece: _Piece) -> None:
        import torch

        job, start, length = piece
        entry, target, scale = job
        place = target.view(-1)[start : start + length]
        elements, size = entry.block
        offset, nbytes = entry.offset + start // elements * size, length // elements * size
        dtype = None if entry.is_packed else torch_dtypes()[entry.dtype]
        if scale is None and target.dtype == dtype and target.device.type == "cpu":
            self._fill(entry.path, offset, place.view(torch.uint8).numpy())
            return
        buffer = self._free_buffer(nbytes)[:nbytes]
        self._fill(entry.path, offset, buffer.numpy())
        with contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            if dtype is None:
                numbers = unpack(buffer.numpy(), entry.dtype).to(target.device)
            else:
                numbers = buffer.to(target.device, non_blocking=True).view(dtype)
            if scale is not None and scale.numel() == 1:
                numbers = numbers.float().mul_(scale)
            elif scale is not None:
                rows = numbers.float().view(-1, job.row)
                numbers = rows.mul_(scale.view(-1, 1)[start // job.row :][: len(rows)]).view(-1)
            place.copy_(numbers)
            if self.stream is not None:
                self.copied[self.turn].record()

    def _free_buffer(self, nbytes: int) -> "torch.Tensor":
        """The next buffer, once its last copy is done."""
        assert nbytes <= BUFFER_BYTES
        self.turn = (self.turn + 1) % len(self.buffers)
        if self.stream is not None:
            self.copied[self.turn].synchronize()
        return self.buffers[self.turn]

    def _fill(self, path: Path, offset: int, array: Any) -> None:
        """Read the file's bytes from `offset` on into an array of bytes."""
        if self.file is None or self.file.name != path:
            if self.file:
                self.file.close()
            self.file = FileIO(path)  # type: ignore[arg-type]  # it takes paths, and keeps them as its name
        self.file.seek(offset)
        view, done = memoryview(array), 0
        while done < len(view):
            if not (read := self.file.readinto(view[done:])):
                raise RequestError(f"{path}: ended while it was read; was it replaced meanwhile?")
            done += read


def unpack(raw: Any, dtype: str) -> "torch.Tensor":
    """Bytes (numpy, uint8) of whole GGML blocks → their numbers, float32, flat: the gguf package's arithmetic."""
    import gguf
    import torch

    # One row: the package works through rows by the sixteen, with a Python call for each group.
    return torch.from_numpy(gguf.quants.dequantize(raw.reshape(1, -1), gguf.GGMLQuantizationType[dtype])).view(-1)


def warm(paths: Iterable[Path], stop: threading.Event) -> None:
    """Ask the system to bring files into its page cache, in order; returns early once `stop` is set.

    Does nothing where the system cannot be asked (macOS, Windows). Whether there is room is the caller's to know.
    """
    if not hasattr(os, "posix_fadvise"):
        return
    with contextlib.suppress(OSError):  # whoever reads the files will say what is wrong with them
        for path in paths:
            with open(path, "rb") as file:
                for offset in range(0, os.fstat(file.fileno()).st_size, WARM_BYTES):
                    if stop.is_set():
                        return
                    os.posix_fadvise(file.fileno(), offset, WARM_BYTES, os.POSIX_FADV_WILLNEED)
