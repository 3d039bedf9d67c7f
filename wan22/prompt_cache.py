"""Encoded prompts on disk: the negative prompt is nearly always the same, and 11 GB of text encoder are read for it.

One small file a prompt. Its name is a digest of all that the numbers depend on: the prompt, the text encoder's and
tokenizer's files, dtype, device and library versions; so that what comes out is, bit for bit, what encoding here would
give. A file that is not whole, or not what its name says, is as good as none. Nothing here may fail a run: where the
folder cannot be read or written there is no cache.
"""

import contextlib
import hashlib
import json
import os
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wan22.checkpoint import Checkpoint
from wan22.config import digest
from wan22.machine import cache_folder

VARIABLE = "WAN22_PROMPT_CACHE"  # a folder, or `off`
MOST_BYTES = 256 << 20  # in the folder: some 300 prompts of usual length
FORMAT = 2


@dataclass(frozen=True)
class Encoded:
    """A prompt's context [M, E] on the CPU, and whether the prompt was cut to fit."""

    context: Tensor
    cut: bool


def default_folder() -> Path | None:
    """Where the cache is, by the environment; None where it is off."""
    said = os.environ.get(VARIABLE, "")
    if said.lower() in ("off", "0", "no", "false"):
        return None
    return Path(said) if said else cache_folder() / "prompts"


class PromptCache:
    """The prompts of one text encoder, as one device encodes them in one dtype."""

    def __init__(self, folder: Path, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        self.folder = folder
        self._dtype = dtype
        self._encoder = digest({
            "format": FORMAT, "text encoder": checkpoint.text_identity(), "dtype": str(dtype),
            "device": _device_name(device), "torch": torch.__version__, "transformers": version("transformers"),
            "tokenizers": version("tokenizers"), "ftfy": version("ftfy"),
        })  # fmt: skip

    def _path(self, prompt: str) -> Path:
        return self.folder / f"{digest({'prompt': prompt, 'encoder': self._encoder})}.context"

    def get(self, prompt: str) -> Encoded | None:
        """What was kept, if it is whole."""
        path = self._path(prompt)
        try:
            head, _, body = path.read_bytes().partition(b"\n")
            told = json.loads(head)
            if told.pop("sha256") != _checksum(told, body):
                return None
            context = torch.frombuffer(bytearray(body), dtype=self._dtype).view(told["shape"])
            cut = bool(told["cut"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError):
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # the one that was used last goes last
        return Encoded(context, cut)

    def put(self, prompt: str, encoded: Encoded) -> None:
        """Keep it, whole or not at all."""
        context = encoded.context.contiguous()
        body = context.view(torch.uint8).numpy().tobytes()
        told = {"shape": list(context.shape), "cut": encoded.cut}
        told["sha256"] = _checksum(told, body)
        path = self._path(prompt)
        beside = path.with_suffix(f".{os.getpid()}.part")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            beside.write_bytes(json.dumps(told).encode() + b"\n" + body)
            beside.replace(path)
            self._trim()
        except OSError:
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)

    def _trim(self) -> None:
        """Drop those that were not used for longest; another process may do so at the same time."""
        files = []
        for path in (*self.folder.glob("*.context"), *self.folder.glob("*.part")):  # the folder may hold others' files
            with contextlib.suppress(OSError):
                state = path.stat()
                files.append((state.st_mtime, state.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= MOST_BYTES:
                return
            with contextlib.suppress(OSError):
                path.unlink()
            total -= size


def cache_for(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> PromptCache | None:
    """The cache, where there is to be one; random weights, which lie in no file, have none."""
    folder = default_folder()
    return PromptCache(folder, checkpoint, dtype, device) if folder and checkpoint.text_encoder.files else None


def _checksum(told: dict[str, Any], body: bytes) -> str:
    return hashlib.sha256(json.dumps(told).encode() + body).hexdigest()


def _device_name(device: torch.device) -> str:
    """What rounds as this does: a kind of GPU; on a CPU its instructions and the threads that share a sum."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {torch.get_num_threads()} threads"
