"""A run's state on disk: its latents, saved whole before decoding starts."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan22.config import RequestError, RunError
from wan22.tensor_files import read_header

if TYPE_CHECKING:
    from torch import Tensor


def latents_path(output: Path) -> Path:
    """Where the latents of an output lie: `NAME.latents.safetensors` beside it."""
    return output.with_name(f"{output.stem if output.suffix else output.name}.latents.safetensors")


def save_latents(path: Path, latents: "Tensor", record: dict[str, Any]) -> None:
    """Write latents [C, T, H, W] float32 and the record, renamed when whole. Raises RunError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_file({"latents": latents.contiguous()}, partial, metadata={"wan22": json.dumps(record)})
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise RunError(f"{path}: the latents could not be written: {error}") from None


def read_latents_record(path: Path) -> dict[str, Any]:
    """The record inside a file of latents, without reading them. Raises RequestError."""
    entries, header = read_header(path)
    try:
        record = json.loads(json.loads(header)["__metadata__"]["wan22"])
    except (ValueError, KeyError, TypeError, RecursionError):
        record = None
    if not isinstance(record, dict) or list(entries) != ["latents"] or entries["latents"].dtype != "F32":
        raise RequestError(f"{path}: not latents that wan22 wrote")
    return record
