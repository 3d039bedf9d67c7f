"""`wan22 bench --memory`: what plan.py predicts beside what is measured, placement by placement.

Each row runs the phases of a whole run through the pipeline itself: both prompts are encoded, two guided steps are
taken, one an expert, and all frames are decoded. Of each forward only the first blocks are computed, since every block
takes the same memory; all blocks' weights come and go as in a run. They are zeros: to draw 57 GB of numbers, to no end,
would take longer than all the rest. Rows as in bench.py.
"""

import gc
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from wan22.checkpoint import Checkpoint
from wan22.config import (
    GPU_RESERVE,
    OFFLOADS,
    DoesNotFit,
    Placement,
    Precision,
    Request,
    RequestError,
    parse_bytes,
    parse_size,
)
from wan22.machine import gpu_memory
from wan22.pipeline import Pipeline
from wan22.plan import gib
from wan22.report import Reporter
from wan22.sizes import total, weight_terms

Row = dict[str, Any]
# The most telling first: a run may be cut short.
DEFAULT_ROWS = ("720p:expert", "720p:block:16GiB", "480p:block:8GiB", "720p:none", "720p:block", "480p:expert",
                "480p:none", "480p:block")  # fmt: skip
COMPUTED_BLOCKS = 3
# With these two steps, one is the high-noise expert's and one the low-noise one's.
STEPS, SHIFT = 2, 5.0


@dataclass(frozen=True)
class Wanted:
    """A row to measure: a size, a placement, and a limit of GPU memory."""

    size: str
    offload: str
    limit: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Wanted":
        """`720p:block`, `480p:block:8GiB`, `64x64:none`. Raises RequestError."""
        size, _, rest = text.partition(":")
        offload, _, limit = rest.partition(":")
        if not size or offload not in OFFLOADS or not re.fullmatch(r"[^:]*", limit):
            raise RequestError(f"--rows {text}: not SIZE:OFFLOAD[:LIMIT]", hint="say 720p:block:16GiB")
        return cls(size, offload, parse_bytes("--rows", limit) if limit else None)

    def of(self, request: Request) -> Request:
        """The request of this row. Raises RequestError for a size that cannot be."""
        width, height = parse_size(self.size)
        return replace(request, width=width, height=height, num_steps=STEPS, shift=SHIFT)


class Heard(Reporter):
    """Keeps what it is warned of."""

    def __init__(self) -> None:
        super().__init__()
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def run(
    checkpoint: Checkpoint, request: Request, precision: Precision, placement: Placement, rows: Sequence[str] = ()
) -> Iterator[Row]:
    """One row after the other; what does not fit here is said. Raises RequestError."""
    wanted = [Wanted.parse(text) for text in rows or DEFAULT_ROWS]
    for one, asked in [(one, one.of(request)) for one in wanted]:  # all of them are right, before one is measured
        where = replace(placement, offload=one.offload, gpu_memory_limit=one.limit)
        row: Row = {"kind": "memory", "size": one.size, "offload": one.offload, "limit": one.limit}
        try:
            row |= _measure(Pipeline(checkpoint, precision, where), asked)
        except DoesNotFit as error:
            row["lacks"] = str(error)
        yield row
        gc.collect()
        if torch.cuda.is_available() and placement.device != "cpu":
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(1.0, torch.cuda.current_device())


def _measure(pipeline: Pipeline, request: Request) -> Row:
    pipeline.choose_attention(request)  # whose probe is no part of the phases
    pipeline.experts.memory.trim()
    gc.collect()
    plan = pipeline.plan(request)
    chosen = plan.chosen
    assert chosen
    # Where there is room the first expert comes early, beside the text encoder: the text's own peak is looked at.
    pipeline.experts.begin = lambda *args: None  # type: ignore[method-assign, assignment]
    pipeline.experts.get = _computing_few(pipeline.experts.get)  # type: ignore[method-assign]
    heard = Heard()
    latents = pipeline.denoise(request, heard)
    with heard.phase("decode"):
        for _ in pipeline.decode(latents, heard):
            pass
    names = {"encode the text": "text", "denoise": "denoise", "decode": "decode"}
    predicted = {"text": chosen.peak("text"), "denoise": chosen.taken("denoise"), "decode": chosen.taken("decode")}
    phases = {
        names[phase.name]: {"predicted": predicted[names[phase.name]], "measured": phase.gpu_bytes,
                            "host": phase.host_bytes, "seconds": phase.seconds}
        for phase in heard.phases
    }  # fmt: skip
    memory, item = pipeline.experts.memory, pipeline.dtype.itemsize
    return {
        "phases": phases, "resident_blocks": chosen.residency.resident_blocks, "tiles": list(chosen.tiles),
        "predicted_bytes": max(predicted.values()), "predicted_host_bytes": chosen.host_bytes,
        "measured_bytes": _most(phases, "measured"), "measured_host_bytes": _most(phases, "host"),
        "outside_torch_bytes": _outside_torch(pipeline.device),
        # By the counting allocator: on a CPU all that there is, on a GPU of pinned memory.
        "predicted_weights": total(weight_terms(chosen.residency, pipeline.sizes.at(pipeline.precision), item)),
        "counted_weights": memory.on_device.peak or None, "pinned_bytes": memory.on_host.peak,
        "stayed": pipeline.experts.residency == chosen.residency and not heard.warnings, "warnings": heard.warnings,
    }  # fmt: skip


def _most(phases: dict[str, Row], what: str) -> int | None:
    return max((phase[what] for phase in phases.values() if phase[what] is not None), default=None)


def _outside_torch(device: torch.device) -> int | None:
    """Bytes that the card says are taken and torch did not take: the context, libraries, other processes."""
    if device.type != "cuda" or not (room := gpu_memory(str(device))):
        return None
    return room.total - room.free - torch.cuda.memory_reserved(device)


def _computing_few(get: Callable[..., Any]) -> Callable[..., Any]:
    """Experts whose later blocks hand on what they are given; hooks that bring their weights run all the same."""

    def few(*args: Any) -> Any:
        model = get(*args)
        for block in list(model.blocks)[COMPUTED_BLOCKS:]:
            block.forward = _hand_on
        return model

    return few


def _hand_on(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    return x


# --- for people ------------------------------------------------------------------------------------------------------
HEAD = (f"{'':<22}{'text':^15}{'denoise':^15}{'decode':^15}{'most':^23}{'host':^23}\n{'size, placement':<22}"
        f"{'pred. meas.  ' * 3:<45}{'predicted  measured':>21}{'predicted  measured':>23}   GiB")  # fmt: skip


def as_text(row: Row) -> str:
    """A row in a line; the head is told once, before."""
    limit = f" in {gib(row['limit'])}" if row["limit"] else ""
    name = f"{row['size']} {row['offload']}{limit}"
    if "lacks" in row:
        return f"{name:<22}{row['lacks']}"
    parts = [name.ljust(22)]
    for phase in row["phases"].values():
        parts.append(f"{_number(phase['predicted']):>6} {_number(phase['measured']):>6}  ")
    for predicted, measured in ((row["predicted_bytes"], row["measured_bytes"]),
                                (row["predicted_host_bytes"], row["measured_host_bytes"])):  # fmt: skip
        error = f"({(predicted - measured) / measured:+.0%})" if measured else ""
        parts.append(f"{_number(predicted):>7} {_number(measured):>7} {error:<7}")
    notes = [f"{row['resident_blocks']} blocks resident"] if row["resident_blocks"] else []
    notes += [f"tiles {row['tiles'][0]} x {row['tiles'][1]}"] if row["tiles"] != [1, 1] else []
    if row["outside_torch_bytes"] is not None:
        notes.append(f"outside torch {gib(row['outside_torch_bytes'])} of {gib(GPU_RESERVE)}")
    notes.append(", ".join(f"{name} {phase['seconds']:.0f} s" for name, phase in row["phases"].items()))
    return "".join([*parts, "  ", ", ".join([*notes, *row["warnings"]])]).rstrip()


def _number(nbytes: int | None) -> str:
    return "–" if nbytes is None else f"{nbytes / 2**30:.2f}"
