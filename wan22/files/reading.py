"""Getting tensors out of files as fast as the disk gives them: read once, in order, by a few threads, through buffers.

A tensor that needs no change is read straight into its place. Any other goes through a small buffer (on a GPU: two
pinned ones a thread, copied on the thread's own stream while the next piece is read), is scaled or dequantized there,
and cast into its place: host memory holds the result and the buffers, never a file, and nothing stays mapped.

The cast is a tenth of the work. What costs is the first touch of every page of the result (memory.py has large ones),
and a disk that is asked for too little, or by several threads for the same: each piece is asked for ahead of its turn.
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
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from wan22.config import RequestError, RunError
from wan22.several.watch import tick

if TYPE_CHECKING:
    import torch

ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
              "F8_E4M3": 1, "F8_E5M2": 1}  # fmt: skip
READERS = 4
BUFFER_BYTES = 4 << 20  # a thread; 16 MiB measured no faster, and from 4 MiB the cast still finds half in the cache
DECODED_ELEMENTS = 1 << 18  # a piece of GGML blocks: unpacking makes several float32 arrays of this length
AHEAD = 8  # pieces that the system is asked to read meanwhile
ASKED_BYTES = 512 << 10  # at a time: Linux cuts a larger wish to what the disk takes at once, and forgets the rest
DISK_HINT = "the disk or the network behind it fails: wan22 download --check DIR reads every file"


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

    @property
    def span(self) -> tuple[int, int]:
        """Where it lies in its file: offset and length in bytes."""
        elements, size = self.job.entry.block
        return self.job.entry.offset + self.start // elements * size, self.length // elements * size


@cache
def torch_dtypes() -> "dict[str, torch.dtype]":
    """torch's dtype for each of safetensors' words."""
    import torch

    return {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
            "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
            "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}  # fmt: skip


def read_entries(jobs: Sequence[Job]) -> None:
    """Fill every target, each cast to its dtype. Raises RequestError for a file that changed since it was opened,
    RunError for one that the disk does not give."""
    jobs = sorted(jobs, key=lambda job: (job.entry.path, job.entry.offset))
    if not (pieces := list(_pieces(jobs))):
        return
    # Unpacking is arithmetic, and the processor's limit; the rest is the disk's.
    most = max(READERS, min(16, os.cpu_count() or 1)) if any(job.entry.is_packed for job in jobs) else READERS
    left, lock, stop = iter(zip_longest(pieces, pieces[AHEAD:])), threading.Lock(), threading.Event()

    def work(lane: _Lane) -> None:
        import torch

        # Of each thread its own, and where the caller is in it, its targets can be filled in no other.
        with torch.inference_mode(), contextlib.closing(lane):
            while not stop.is_set():
                with lock:
                    piece, later = next(left, (None, None))
                if piece is None:
                    return
                lane.read(piece, later)
                tick()

    lanes = [_Lane(jobs[0].target.device, number) for number in range(min(most, len(pieces)))]
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


@cache
def _stream(device: "torch.device", number: int) -> Any:
    """A lane's stream, the same every time: torch's allocator keeps memory back for every stream that it has seen."""
    import torch

    return torch.cuda.Stream(device)


class _Lane:
    """What one thread reads with: an open file, its buffers, and on a GPU a stream of its own."""

    def __init__(self, device: "torch.device", number: int) -> None:
        import torch

        self.stream: Any = None
        self.turn = 0
        if device.type == "cuda":
            self.stream = _stream(device, number)
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

    def read(self, piece: _Piece, later: _Piece | None) -> None:
        """Bring a piece to its place; `later`: one whose turn comes soon."""
        import torch

        job, start, length = piece
        entry, target, scale = job
        place = target.view(-1)[start : start + length]
        offset, nbytes = piece.span
        self._open(entry.path)
        if later and later.job.entry.path == entry.path:
            self._ask_for(*later.span)
        dtype = None if entry.is_packed else torch_dtypes()[entry.dtype]
        if scale is None and target.dtype == dtype and target.device.type == "cpu":
            self._fill(offset, place.view(torch.uint8).numpy())
            return
        buffer = self._free_buffer(nbytes)[:nbytes]
        self._fill(offset, buffer.numpy())
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

    def _open(self, path: Path) -> None:
        if self.file is None or self.file.name != path:
            if self.file:
                self.file.close()
            self.file = FileIO(path)  # type: ignore[arg-type]  # it takes paths, and keeps them as its name

    def _ask_for(self, offset: int, nbytes: int) -> None:
        """The system's own reading ahead sees threads that jump about, and several reading the same."""
        assert self.file
        with contextlib.suppress(OSError):  # it is only a wish
            for start, length in _wishes(offset, nbytes):
                os.posix_fadvise(self.file.fileno(), start, length, os.POSIX_FADV_WILLNEED)

    def _fill(self, offset: int, array: Any) -> None:
        """Read the open file's bytes from `offset` on into an array of bytes."""
        assert self.file
        self.file.seek(offset)
        view, done = memoryview(array), 0
        while done < len(view):
            try:
                read = self.file.readinto(view[done:])
            except OSError as error:  # which names no file
                raise RunError(f"{self.file.name}: cannot be read: {error.strerror}", hint=DISK_HINT) from None
            if not read:
                raise RequestError(f"{self.file.name}: ended while it was read; was it replaced meanwhile?")
            done += read


def unpack(raw: Any, dtype: str) -> "torch.Tensor":
    """Bytes (numpy, uint8) of whole GGML blocks → their numbers, float32, flat: the gguf package's arithmetic."""
    import gguf
    import torch

    # One row: the package works through rows by the sixteen, with a Python call for each group.
    return torch.from_numpy(gguf.quants.dequantize(raw.reshape(1, -1), gguf.GGMLQuantizationType[dtype])).view(-1)


def _wishes(offset: int, nbytes: int) -> Iterator[tuple[int, int]]:
    """Bytes of a file as offsets and lengths that the system can be asked to read ahead; nothing where it cannot be
    asked (macOS, Windows)."""
    end = offset + nbytes if hasattr(os, "posix_fadvise") else offset
    return ((start, min(ASKED_BYTES, end - start)) for start in range(offset, end, ASKED_BYTES))


def warm(paths: Iterable[Path], stop: threading.Event) -> None:
    """Ask the system to bring files into its page cache, in order; returns early once `stop` is set.

    Whether there is room is the caller's to know.
    """
    with contextlib.suppress(OSError):  # whoever reads the files will say what is wrong with them
        for path in paths:
            with open(path, "rb") as file:
                for start, length in _wishes(0, os.fstat(file.fileno()).st_size):
                    if stop.is_set():
                        return
                    os.posix_fadvise(file.fileno(), start, length, os.POSIX_FADV_WILLNEED)
