"""Memory that weights live in: the device's, and exact-size pinned memory of the host; copies between them.

One small interface with two forms. On a GPU copies run on a stream of their own and are awaited through events. On a
CPU the same calls allocate, count and copy at once, so that tests can show by its peaks where a placement keeps what.
"""

import contextlib
import mmap
import os
import sys
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wan22.config import GPU_RESERVE
from wan22.machine import Room, gpu_memory, host_memory

ASIDE = GPU_RESERVE // 2  # for what is taken past torch
PORTABLE = 1  # cudaHostRegisterPortable: pinned for every GPU's context
TOUCHING = 16  # threads, at most, that take pages of the host's memory
OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)  # of the device; of the host

# torch's pieces of the GPU's memory are to grow where they are: of pieces of fixed size much is free, but too small for
# the decoder's arrays, and what should fit by 1.3 GiB did not. torch looks here when it takes the first of them.
if sys.platform == "linux" and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


@dataclass
class Count:
    """Bytes alive now, and the most that ever were."""

    live: int = 0
    peak: int = 0

    def add(self, nbytes: int) -> None:
        self.live += nbytes
        self.peak = max(self.peak, self.live)

    def take(self, nbytes: int) -> None:
        self.live -= nbytes


def _mapped(nbytes: int) -> np.ndarray:
    """Fresh bytes from the system: page-aligned, whole pages, given back as soon as nothing refers to them. Raises
    MemoryError."""
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
    try:
        pages = mmap.mmap(-1, max(nbytes, 1), **private)
    except OSError as error:
        raise MemoryError(f"{nbytes:,} bytes of host memory: {error.strerror}") from None
    # Large pages come, and are pinned, several times as fast; what a GPU reads must not be copied when a child is made.
    for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
        with contextlib.suppress(AttributeError, OSError):
            pages.madvise(getattr(mmap, advice))
    return np.frombuffer(pages, dtype=np.uint8)[:nbytes]


def _touched(array: np.ndarray) -> np.ndarray:
    """The same bytes, their pages taken from the system by many threads at once. The driver would take them one after
    the other, at 0.1 s a GB at best, and up to 5 where the system is a virtual machine that gave them back to its host.
    """
    threads = max(1, min(TOUCHING, os.cpu_count() or 1, len(array) >> 24))
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda part: part[:: mmap.PAGESIZE].fill(0), np.array_split(array, threads)))
    return array


def empty_on_host(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor in the host's memory, in large pages that are there already. Raises MemoryError."""
    count = torch.Size(shape).numel()
    return torch.from_numpy(_touched(_mapped(count * dtype.itemsize))).view(dtype).view(shape)


class Memory:
    """The CPU's form: the device's memory is the host's, every call is done when it returns.

    limit: bytes of device memory, beyond which `empty` raises OutOfMemoryError as a GPU would; for tests.
    has_host: whether the host's memory is another than the device's, so that copies there make sense; tests say so.
    """

    def __init__(self, device: torch.device, limit: int | None = None, has_host: bool = False) -> None:
        self.device, self.limit, self.has_host = device, limit, has_host
        self.on_device, self.on_host = Count(), Count()

    def empty(self, nbytes: int) -> Tensor:
        """Device memory, [nbytes] uint8. Raises torch.OutOfMemoryError."""
        if self.limit is not None and self.on_device.live + nbytes > self.limit:
            raise torch.OutOfMemoryError(f"{nbytes:,} bytes beside {self.on_device.live:,} of {self.limit:,}")
        return self._counted(_mapped(nbytes), self.on_device)

    def host(self, nbytes: int) -> Tensor:
        """Host memory that copies to the device run from at full speed, [nbytes] uint8. Raises MemoryError."""
        return self._counted(_mapped(nbytes), self.on_host)

    def copy(self, target: Tensor, source: Tensor, after: Any = None) -> Any:
        """Queue a copy between host and device, once the mark `after` is reached; its own mark."""
        target.copy_(source)
        return None

    def mark(self) -> Any:
        """All the work that the device has been given until now."""
        return None

    def wait(self, mark: Any) -> None:
        """Work given to the device from now on waits for a mark."""

    def finish(self, mark: Any) -> None:
        """Come back when a mark is reached."""

    def move(self, target: Tensor, source: Tensor) -> None:
        """A copy between host and device that is done when it returns, after all work given until now."""
        self.finish(self.copy(target, source, self.mark()))

    @contextlib.contextmanager
    def aside(self, after: Any) -> Iterator[None]:
        """Device work in here, of another thread, waits for the mark `after` and for nothing else, and is done at the
        end. Device memory is to be taken before."""
        yield

    def trim(self) -> None:
        """Give what is free back to the system."""

    def rooms(self) -> tuple[Room | None, Room]:
        """What this process may have in all, of a GPU's memory where there is one, and of the host's: what it holds
        already is free, since it is given back before it is in the way."""
        room = host_memory()
        return None, replace(room, free=room.free + self.on_host.live + self.on_device.live)

    def free(self, limit: int | None) -> int:
        """Bytes that work on the device can take now, some left aside."""
        return int(0.9 * host_memory().free)

    @staticmethod
    def _counted(array: np.ndarray, count: Count) -> Tensor:
        count.add(array.nbytes)
        weakref.finalize(array, count.take, array.nbytes).atexit = False  # a tensor's views keep its array
        return torch.from_numpy(array)


class CudaMemory(Memory):
    """A GPU's form."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device, has_host=True)
        self._stream = torch.cuda.Stream(device)

    def empty(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def host(self, nbytes: int) -> Tensor:
        # torch's own pinned allocator rounds up to powers of two: 28 GB become 43.
        array = _touched(_mapped(nbytes))
        runtime, address = torch.cuda.cudart(), array.ctypes.data
        # A thread begins with the first GPU as its own, and would open a context there.
        with torch.cuda.device(self.device):
            error = int(runtime.cudaHostRegister(address, nbytes, PORTABLE))
        if error:
            self._forget_error()
            raise MemoryError(f"{nbytes:,} bytes of host memory cannot be pinned (CUDA error {error})")
        # Runs before the array, and so its pages, go.
        weakref.finalize(array, runtime.cudaHostUnregister, address).atexit = False
        return self._counted(array, self.on_host)

    def copy(self, target: Tensor, source: Tensor, after: Any = None) -> Any:
        with torch.cuda.stream(self._stream):
            if after is not None:
                self._stream.wait_event(after)
            target.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def mark(self) -> Any:
        return torch.cuda.current_stream(self.device).record_event()

    def wait(self, mark: Any) -> None:
        torch.cuda.current_stream(self.device).wait_event(mark)

    def finish(self, mark: Any) -> None:
        if mark is not None:
            mark.synchronize()

    @contextlib.contextmanager
    def aside(self, after: Any) -> Iterator[None]:
        stream = torch.cuda.Stream(self.device)
        with torch.cuda.stream(stream):
            if after is not None:
                stream.wait_event(after)
            try:
                yield
            finally:  # whoever fails lets go of memory that this work may still write to
                stream.synchronize()

    def trim(self) -> None:
        torch.cuda.empty_cache()

    def _forget_error(self) -> None:
        """The CUDA runtime keeps the last error of a call, and torch's next kernel launch would take it for its own."""
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device=self.device)

    def rooms(self) -> tuple[Room | None, Room]:
        room = gpu_memory(f"cuda:{self.device.index or 0}") or self._torch_room()
        host = host_memory()
        return (replace(room, free=room.free + torch.cuda.memory_reserved(self.device)),
                replace(host, free=host.free + self.on_host.live))  # fmt: skip

    def free(self, limit: int | None) -> int:
        cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        free = self._torch_room().free + cached - ASIDE
        if limit is not None:
            free = min(free, limit - GPU_RESERVE - torch.cuda.memory_allocated(self.device))
        return max(0, free)

    def _torch_room(self) -> Room:
        free, everything = torch.cuda.mem_get_info(self.device)
        return Room(everything, free, torch.cuda.get_device_name(self.device))


def limit_gpu_memory(device: torch.device, limit: int | None) -> None:
    """Let torch take no more of a GPU than `limit` bytes leave beside the CUDA context; None: no limit."""
    if device.type == "cuda" and limit is not None:
        everything = torch.cuda.get_device_properties(device).total_memory
        index = torch.cuda.current_device() if device.index is None else device.index  # which it insists on
        torch.cuda.set_per_process_memory_fraction(min(1.0, max(0, limit - ASIDE) / everything), index)


def memory_of(device: torch.device) -> Memory:
    return CudaMemory(device) if device.type == "cuda" else Memory(device)
