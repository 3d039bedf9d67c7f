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
"""

import os
import secrets
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from wan22.config import DEFAULT_TASK, DiskFull, Request, RequestError, RunError, WanError
from wan22.options import Base, read_checkpoint, read_encoding, read_placement, read_precision
from wan22.output.names import DISK_FULL, exists, reason
from wan22.report import Reporter

GRACE = 120.0  # seconds for a worker to keep its state


class Pipe(Protocol):
    """What multiprocessing's connections are, and others can be."""

    def send(self, said: Any, /) -> None: ...
    def recv(self) -> Any: ...


@dataclass(frozen=True)
class Work:
    """What a worker is told at its start.

    flags, base: those of the batch; folder: where the videos go; threads: for torch, 0 to leave them as they are;
    ahead: requests whose prompts are encoded at once; identity: the checkpoint that must be met here, where it may be
    another; run: what this batch is called in the folder's journal.
    """

    flags: dict[str, Any]
    base: Base
    folder: Path
    device: str = "cpu"
    threads: int = 0
    ahead: tuple[Request, ...] = ()
    identity: str | None = None
    run: str = field(default_factory=lambda: secrets.token_hex(16))


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


def live(pipe: Pipe, work: Work) -> None:
    """A worker's life, till it is given None."""
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        pipeline = _open(work)
    except WanError as error:
        pipe.send(("fatal", {"message": str(error), "hint": error.hint, "code": error.exit_code}))
        return
    pipe.send(("ready", {}))
    while (given := pipe.recv()) is not None:
        name, request = given
        _make(pipe, pipeline, work.folder / name, request, work.flags)


def _open(work: Work) -> Any:
    import torch

    from wan22.pipeline import Pipeline

    if work.threads:
        torch.set_num_threads(work.threads)
    flags, base = work.flags, work.base
    placement = replace(read_placement(flags, base), device=work.device)
    checkpoint, precision = read_checkpoint(flags, base, DEFAULT_TASK), read_precision(flags, base)
    pipeline = Pipeline(checkpoint, precision, placement, read_encoding(flags, base))
    if work.identity not in (None, pipeline.identity):
        raise RequestError(f"{checkpoint.folder}: is another checkpoint here than where the batch was begun")
    texts = [text for request in work.ahead for text in _texts(request)]
    pipeline.encode(list(dict.fromkeys(texts)), Reporter())
    return pipeline


def _texts(request: Request) -> tuple[str, ...]:
    """The texts that a request needs encoded: the negative prompt only where some step is guided."""
    return (request.prompt, request.negative_prompt) if request.guided else (request.prompt,)


def _make(pipe: Pipe, pipeline: Any, output: Path, request: Request, flags: dict[str, Any]) -> None:
    from wan22.state import Busy

    start = time.perf_counter()
    try:
        request, state = pipeline.begin(request, output, overwrite=True)  # of a state that no longer fits, not a file
        with state:
            if exists(output) and not state.finished:
                pipe.send(("there", {}))  # another batch has been quicker
                return
            pipe.send(("start", {}))
            if state.begun:
                said = f"going on from step {state.begun.done} of {state.steps}"
                pipe.send(("event", {"event": "note", "text": said, "resumed": state.begun.done}))
            reporter = _PipeReporter(pipe)
            pipeline.generate_file(request, state, "error", flags["keep_latents"], reporter, flags["preview"])
    except Busy:
        pipe.send(("busy", {}))
    except WanError as error:
        data = {"may_pass": isinstance(error, RunError), "full": isinstance(error, DiskFull)}
        pipe.send(("failed", {"error": str(error), **data}))
    except (EOFError, BrokenPipeError):
        raise
    except OSError as error:  # of a folder or disk, and no reason to load the weights again
        said, full = f"{error.filename or output}: {reason(error)}", error.errno in DISK_FULL
        pipe.send(("failed", {"error": said, "may_pass": True, "full": full}))
    except Exception as error:
        pipe.send(("failed", {"error": f"{type(error).__name__}: {error}", "may_pass": False, "full": False}))
        if type(error).__name__ != "OutOfMemoryError":
            raise SystemExit(1) from error  # what else it broke is not known: the next one begins anew
    else:
        pipe.send(("done", {"seconds": round(time.perf_counter() - start, 3)}))
