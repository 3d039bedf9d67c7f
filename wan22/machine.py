"""What this machine has: free GPU memory asked of the driver, free host memory of the kernel, a place for caches.
Standard library only.

Asking torch instead would take seconds to import it and half a gigabyte of GPU memory to start it.
"""

import contextlib
import ctypes
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Room:
    """Bytes in all and free; `name` of the card, or of what limits the host."""

    total: int
    free: int
    name: str = ""


# --- the disk --------------------------------------------------------------------------------------------------------
def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/wan22`, or `~/.cache/wan22`; a relative one is to be ignored, says the XDG specification. Whose
    home is not known gets a folder that cannot be made."""
    asked = os.environ.get("XDG_CACHE_HOME", "")
    return Path(asked if os.path.isabs(asked) else os.path.join("/", os.path.expanduser("~"), ".cache")) / "wan22"


# --- the host --------------------------------------------------------------------------------------------------------
def host_memory(root: Path = Path("/")) -> Room:
    """What this process can still take: the system's available memory, or less where a control group says so.

    root: where /proc and /sys are. Without them (macOS, Windows), sysconf's, all of it taken for free.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 1 << 62
        return Room(total, total)
    table = {name: int(value.split()[0]) << 10 for name, _, value in (line.partition(":") for line in lines)}
    room = Room(table["MemTotal"], table.get("MemAvailable", table["MemFree"]))
    for group in _groups(root):
        if limited := _group_room(group):
            room = min(room, limited, key=lambda room: room.free)
    return room


def _groups(root: Path) -> list[Path]:
    """The control groups this process is in and those above them, of version 2 and 1, as far as they can be seen."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    groups: list[Path] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):
            top, tree = _mount(root, controllers)
            # A container's tree may begin at its own group, while its groups are named from the system's.
            inner = tree / path.removeprefix(top.rstrip("/")).lstrip("/")
            groups += [folder for folder in (inner, *inner.parents) if folder.is_relative_to(tree)]
    return list(dict.fromkeys(groups))


def _mount(root: Path, controllers: str) -> tuple[str, Path]:
    """Which group the tree of these controllers (none: version 2's) begins with, and where the tree is."""
    with contextlib.suppress(OSError, ValueError):
        for line in (root / "proc/self/mountinfo").read_text().splitlines():
            place, _, kind = line.partition(" - ")
            system, _, options = kind.split(" ", 2)
            _, _, _, top, folder, *_ = place.split()
            if system == "cgroup" and controllers and "memory" in options.split(","):
                return top, root / folder.lstrip("/")
            if system == "cgroup2" and not controllers:
                return top, root / folder.lstrip("/")
    return "/", root / "sys/fs/cgroup" / controllers


def _group_room(group: Path) -> Room | None:
    """What a group's limit leaves. Its page cache counts as free, since the kernel drops it first, and so does what of
    it was read more than once, as weights from disk are; but not files that are mapped, programs at work."""
    for limit, used, prefix, mapped in (
        ("memory.max", "memory.current", "", "file_mapped"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_", "total_mapped_file"),
    ):
        try:
            total, taken = int((group / limit).read_text()), int((group / used).read_text())
            lines = (group / "memory.stat").read_text().splitlines()
        except (OSError, ValueError):  # not there, or "max"
            continue
        table = {name: int(value) for name, value in (line.split() for line in lines)}
        cache = table.get(f"{prefix}inactive_file", 0) + table.get(f"{prefix}active_file", 0) - table.get(mapped, 0)
        return Room(total, max(0, total - taken + max(0, cache)), "control group")
    return None


# --- the GPU ---------------------------------------------------------------------------------------------------------
class _NvmlMemory(ctypes.Structure):
    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


def gpu_memory(device: str = "cuda") -> Room | None:
    """The memory of one GPU (`cuda`, `cuda:N`), by NVML or nvidia-smi; None where there is none."""
    card = _card(device)
    return None if card is None else _by_nvml(card) or _by_nvidia_smi(card)


def gpu_capability(device: str = "cuda") -> tuple[int, int] | None:
    """The compute capability of one GPU: (9, 0) for Hopper; None where there is none."""
    if (card := _card(device)) is None:
        return None
    return _capability_by_nvml(card) or _capability_by_nvidia_smi(card)


def _card(device: str) -> str | None:
    """The driver's name of a GPU, an index or a UUID. CUDA_VISIBLE_DEVICES numbers the cards for this process, as it
    does for CUDA."""
    number = int(device.partition(":")[2] or 0)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    card = str(number)
    if visible is not None:
        cards = [card.strip() for card in visible.split(",")]
        if number >= len(cards) or not cards[number] or cards[number] == "-1":
            return None
        card = cards[number]
    return card


@contextlib.contextmanager
def _nvml(card: str) -> Iterator[tuple[Any, Any]]:
    """The library, and its handle of a card; two Nones where either is missing."""
    try:
        nvml = ctypes.CDLL("nvml.dll" if os.name == "nt" else "libnvidia-ml.so.1")
    except OSError:
        yield None, None
        return
    if nvml.nvmlInit_v2():
        yield None, None
        return
    try:
        handle = ctypes.c_void_p()
        by_uuid = nvml.nvmlDeviceGetHandleByUUID(card.encode(), ctypes.byref(handle)) if not card.isdigit() else 0
        by_index = nvml.nvmlDeviceGetHandleByIndex_v2(int(card), ctypes.byref(handle)) if card.isdigit() else 0
        yield (None, None) if by_uuid or by_index else (nvml, handle)
    finally:
        nvml.nvmlShutdown()


def _by_nvml(card: str) -> Room | None:
    with _nvml(card) as (nvml, handle):
        memory, name = _NvmlMemory(), ctypes.create_string_buffer(96)
        if nvml is None or nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)):
            return None
        nvml.nvmlDeviceGetName(handle, name, len(name))
        return Room(memory.total, memory.free, name.value.decode(errors="replace"))


def _by_nvidia_smi(card: str) -> Room | None:
    try:
        total, free, name = _query(card, "memory.total,memory.free,name").split(", ", 2)
        return Room(int(total) << 20, int(free) << 20, name)
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return None


def _capability_by_nvml(card: str) -> tuple[int, int] | None:
    with _nvml(card) as (nvml, handle):
        major, minor = ctypes.c_int(), ctypes.c_int()
        if nvml is None or nvml.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor)):
            return None
        return major.value, minor.value


def _capability_by_nvidia_smi(card: str) -> tuple[int, int] | None:
    try:
        major, minor = _query(card, "compute_cap").split(".")
        return int(major), int(minor)
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return None


def _query(card: str, what: str) -> str:
    query = ["nvidia-smi", "-i", card, f"--query-gpu={what}", "--format=csv,noheader,nounits"]
    return subprocess.run(query, capture_output=True, text=True, timeout=5, check=True).stdout.splitlines()[0]
