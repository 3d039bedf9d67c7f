"""A worker of a batch: the checkpoint opened once, the prompts encoded together, then one video after another.

It talks through a pipe, whatever that is made of: `send((kind, data))`, and `recv()` for what to make. What it says:

| kind     | data                                                                              |
|----------|-----------------------------------------------------------------------------------|
| `ready`  | the checkpoint is open, the prompts are encoded                                   |
| `fatal`  | message, hint, code: no worker can work; the process ends                         |
| `start`  | the output is claimed and the work on it begins                                   |
| `event`  | a step, a note, a warning of the run                                              |
| `busy`, `there` | another process is at work on it, or has been quicker                      |
| `done`   | seconds                                                                           |
| `failed` | error; may_pass: whether another try may go better; full: whether the disk is     |
| `dying`  | why: one of the processes that make up the worker has ended (group.py)            |
"""

import os
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from wan22 import plan
from wan22.config import (
    DEFAULT_TASK,
    DiskFull,
    Placement,
    Request,
    RequestError,
    RunError,
    WanError,
    is_out_of_memory,
)
from wan22.options import Base, read_checkpoint, read_encoding, read_placement, read_precision
from wan22.output.names import DISK_FULL, exists, reason
from wan22.report import Reporter
from wan22.several.launch import Team
from wan22.several.mesh import Mesh, Shares
from wan22.several.watch import of_another

if TYPE_CHECKING:
    from wan22.several.watch import Member

GRACE = 120.0  # seconds for a worker to keep its state
AHEAD = 128  # items whose prompts are encoded at once: 0.1 GB of the usual length, 1 GB of the longest


class Pipe(Protocol):
    """What multiprocessing's connections are, and others can be."""

    def send(self, said: Any, /) -> None: ...
    def recv(self) -> Any: ...


@dataclass(frozen=True)
class Work:
    """What a worker is told at its start.

    flags, base: those of the batch; folder: where the videos go; threads: for torch, 0 to leave them as they are;
    ahead: what is to be made, in order, for prompts to be encoded together; identity: the checkpoint that must be met
    here, where it may be another; gpus: processes that make each video together, of which this is the one of that rank;
    cards: the GPUs that they see, where not all of the machine's; run: what this batch is called in the folder's
    journal.
    """

    flags: dict[str, Any]
    base: Base
    folder: Path
    device: str = "cpu"
    threads: int = 0
    ahead: tuple[Request, ...] = ()
    identity: str | None = None
    gpus: int = 1
    rank: int = 0
    cards: str | None = None
    run: str = field(default_factory=lambda: secrets.token_hex(16))

    @property
    def team(self) -> Team:
        """This process among those that make each video together, all of them on one machine."""
        return Team(self.rank, self.gpus, self.rank, self.gpus)


class _PipeReporter(Reporter):
    """Sends steps and warnings to the parent, one at a time: a preview's thread may warn while the run tells a step."""

    def __init__(self, pipe: Pipe) -> None:
        super().__init__()
        self._pipe, self._one_at_a_time = pipe, threading.Lock()

    def note(self, text: str, **data: Any) -> None:
        if data:
            self._tell("note", text=text, **data)

    def warn(self, text: str) -> None:
        self._tell("warning", text=text)

    def step(self, index: int, expert: str, timestep: float) -> None:
        self._tell("step", step=index + 1, timestep=timestep, expert=expert)

    def _tell(self, event: str, **data: Any) -> None:
        with self._one_at_a_time:
            self._pipe.send(("event", {"event": event, **data}))


def live(pipe: Pipe, work: Work, member: "Member | None" = None) -> None:
    """A worker's life, till it is given None; member: its part in a group of several (group.py)."""
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        pipeline = _open(work)
    except WanError as error:
        if work.rank:
            raise
        pipe.send(("fatal", {"message": str(error), "hint": error.hint, "code": error.exit_code}))
        if member:  # the others may not know
            raise SystemExit(1) from error
        return
    pipe.send(("ready", {}))
    places = {request.prompt: place for place, request in reversed(list(enumerate(work.ahead)))}
    while (given := pipe.recv()) is not None:
        name, request = given
        place = places.get(request.prompt, len(work.ahead))
        pipeline.ahead = _texts(work.ahead[place : place + AHEAD])
        _make(pipe, pipeline, work.folder / name, request, work.flags, member)
    if pipeline.ranks:
        pipeline.ranks.part()


def _open(work: Work) -> Any:
    import torch

    from wan22.pipeline import Pipeline

    if work.threads:
        torch.set_num_threads(work.threads)
    flags, base = work.flags, work.base
    placement = replace(read_placement(flags, base), device=work.device)
    checkpoint, precision = read_checkpoint(flags, base, DEFAULT_TASK), read_precision(flags, base)
    ranks = None
    if work.gpus > 1:
        from wan22.parallel import Ranks

        mesh = mesh_of(placement, work.gpus, Request("x"), plan.Sizes.of(checkpoint))[0]
        ranks = Ranks.of(work.team, mesh, placement)
    pipeline = Pipeline(checkpoint, precision, placement, read_encoding(flags, base), ranks)
    if work.identity not in (None, pipeline.identity):
        raise RequestError(f"{checkpoint.folder}: is another checkpoint here than where the batch was begun")
    pipeline.encode(_texts(work.ahead[:AHEAD]), Reporter())
    return pipeline


def mesh_of(placement: Placement, gpus: int, request: Request, sizes: plan.Sizes) -> tuple[Mesh, Shares]:
    """How a worker's GPUs are spread, and what each has of a request: one mesh for all items, guided or not, so that
    whoever takes an item up again rounds as the first one did. Raises RequestError where a request is too small."""
    return plan.spread(request, replace(placement, gpus=gpus), sizes, guided=True)


def _texts(requests: Sequence[Request]) -> list[str]:
    """The texts that requests need encoded: the negative prompt only where some step is guided."""
    texts = ((one.prompt, one.negative_prompt) if one.guided else (one.prompt,) for one in requests)
    return list(dict.fromkeys(text for some in texts for text in some))


def _make(
    pipe: Pipe, pipeline: Any, output: Path, request: Request, flags: dict[str, Any], member: "Member | None"
) -> None:
    from wan22.state import Busy

    start = time.perf_counter()
    ranks, begun = pipeline.ranks, False
    try:
        request, state = pipeline.begin(request, output, overwrite=True)  # of a state that no longer fits, not a file
        begun = True
        with state:
            there = exists(output) and not state.finished
            if ranks.share(there) if ranks else there:
                pipe.send(("there", {}))  # another batch has been quicker
                return
            if member and ranks.first:
                member.rescue = lambda: state.rescue() and ()
            pipe.send(("start", {}))
            if state.begun:
                said = f"going on from step {state.begun.done} of {state.steps}"
                pipe.send(("event", {"event": "note", "text": said, "resumed": state.begun.done}))
            reporter = _PipeReporter(pipe)
            pipeline.generate_file(request, state, "error", flags["keep_latents"], reporter, flags["preview"])
    except Busy:
        pipe.send(("busy", {}))
    except (EOFError, BrokenPipeError):
        raise
    except Exception as error:
        if ranks and of_another(error):
            raise
        said, may_pass, full, goes_on = _failure(error, output)
        pipe.send(("failed", {"error": said, "may_pass": may_pass, "full": full}))
        # What else it broke is not known, and of several processes the others are stuck: the next one begins anew.
        if not goes_on or (ranks and begun):
            raise SystemExit(1) from error
    else:
        pipe.send(("done", {"seconds": round(time.perf_counter() - start, 3)}))


def _failure(error: Exception, output: Path) -> tuple[str, bool, bool, bool]:
    """What to say, whether another try may go better, whether the disk is full, and whether this worker can go on."""
    if isinstance(error, WanError):
        return str(error), isinstance(error, RunError), isinstance(error, DiskFull), True
    if isinstance(error, OSError):  # of a folder or disk, and no reason to load the weights again
        return f"{error.filename or output}: {reason(error)}", True, error.errno in DISK_FULL, True
    return f"{type(error).__name__}: {error}", False, False, is_out_of_memory(error)
