"""A run's state on disk: what it takes to go on after a kill, beside the output until that is whole.

`NAME.state.safetensors` beside `NAME.mp4` holds the latents, the solver's memory, how many steps are done, and the
record of the run, which whoever goes on must match. After the last step it holds the latents alone. It is written by a
thread of its own, under another name first, and through to the disk before it takes the place of the last one.

A run holds a claim (claim.py) on its output's name, so that two processes never make the same file.
"""

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from wan22.config import Request, RequestError
from wan22.files.tensor_files import read_header
from wan22.many import claim
from wan22.output.names import (
    CLAIM,
    PREVIEW,
    STATE,
    beside,
    exists,
    not_written,
    numbered,
    reason,
    staging_prefix,
    sync,
    sync_entry,
)
from wan22.output.record import read_record

if TYPE_CHECKING:
    import torch
    from torch import Tensor

COMPUTED = "computed.{}"  # latents of the first and the second step
OVERWRITE = "--overwrite begins anew; or name another --output"


@dataclass(frozen=True)
class Progress:
    """A run after `done` of its steps: all that the rest depends on, beside request and weights.

    latents: [C, T, H, W] float32; solver: what a diffusers scheduler remembers from step to step, by attribute:
    tensors, whole numbers, None, and lists of these; computed: with a step cache, the numbers (from 0) and the
    latents of the last two steps that were not skipped.
    """

    done: int
    latents: "Tensor"
    solver: dict[str, Any]
    computed: "tuple[tuple[int, Tensor], ...]" = ()


class Busy(RequestError):
    """Another process is at work on this output."""


def state_path(output: Path) -> Path:
    return beside(output, STATE)


def latents_path(output: Path) -> Path:
    """Where the latents of an output are kept: `NAME.latents.safetensors` beside it."""
    return beside(output, ".latents.safetensors")


# --- reading ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Saved:
    """A state on disk, by its header. steps: of the whole run; automatic: whether the program chose the name."""

    path: Path
    record: dict[str, Any]
    done: int
    steps: int
    automatic: bool
    solver: dict[str, Any]  # a text is the name of a tensor in the file
    computed: list[int]  # the numbers of the steps whose latents are there too

    def progress(self) -> Progress:
        """Its tensors, on the CPU. Raises RequestError, also for latents that no run has made."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = {name: tensor.clone() for name, tensor in load_file(self.path).items()}  # not the file's memory
        except (OSError, SafetensorError) as error:
            raise RequestError(f"{self.path}: cannot be read: {error}", hint=OVERWRITE) from None

        latents = tensors["latents"]
        if tuple(latents.shape) != Request.from_dict(self.record["request"], str(self.path)).latent_shape:
            raise RequestError(f"{self.path}: its latents are {list(latents.shape)}, not what its record says")
        if str(latents.dtype) != "torch.float32" or not latents.isfinite().all():
            raise RequestError(f"{self.path}: its latents are not finite numbers")

        def fill(value: Any) -> Any:
            return tensors[value] if isinstance(value, str) else value

        solver = {
            name: [fill(item) for item in value] if isinstance(value, list) else fill(value)
            for name, value in self.solver.items()
        }
        computed = tuple((index, tensors[COMPUTED.format(place)]) for place, index in enumerate(self.computed))
        return Progress(self.done, latents, solver, computed)


def read_state(path: Path) -> Saved:
    """Raises RequestError where it is not a whole state that wan22 wrote."""
    entries, header = read_header(path)
    try:
        metadata = json.loads(header)["__metadata__"]
        state = json.loads(metadata["state"])
        saved = Saved(path, json.loads(metadata["wan22"]), int(state["done"]), int(state["steps"]),
                      bool(state["automatic"]), dict(state["solver"]), list(state.get("computed") or ()))  # fmt: skip
        named = {item for value in saved.solver.values() for item in (value if isinstance(value, list) else [value])}
        latents = {"latents", *(COMPUTED.format(place) for place in range(len(saved.computed)))}
        whole = {item for item in named if isinstance(item, str)} | latents == set(entries)
        tables = [saved.record["request"], *(saved.record.get(name, {}) for name in ("precision", "versions"))]
        if not all(isinstance(table, dict) for table in tables) or not whole or not 0 <= saved.done <= saved.steps:
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise RequestError(f"{path}: not the state of a run of wan22", hint=OVERWRITE) from None
    return saved


def read_latents_record(path: Path) -> dict[str, Any]:
    """The record inside a file of latents or a run's state, without reading its tensors. Raises RequestError."""
    entries, header = read_header(path)
    try:
        record = json.loads(json.loads(header)["__metadata__"]["wan22"])
    except (ValueError, KeyError, TypeError, RecursionError):
        record = None
    if not isinstance(record, dict) or "latents" not in entries or entries["latents"].dtype != "F32":
        raise RequestError(f"{path}: not latents that wan22 wrote")
    return record


def differences(theirs: dict[str, Any], ours: dict[str, Any], any_seed: bool) -> list[str]:
    """In which settings two records differ, in words: all that decides the picture's bits, the name of the checkpoint's
    folder left out. any_seed: a seed that was drawn for `ours` does not count."""
    ours = json.loads(json.dumps(ours))  # tuples are lists there too
    found = []
    for part in ("request", "precision", "versions"):
        there, here = theirs.get(part) or {}, ours[part]
        for name in dict.fromkeys([*here, *there]):
            if there.get(name) != here.get(name) and not (part == "request" and name == "seed" and any_seed):
                found.append(f"{name} is {_short(there.get(name))} there and {_short(here.get(name))} here")
    if theirs.get("checkpoint") != ours["checkpoint"]:
        found.append("the checkpoint is another")
    return found


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:39]}…"


def is_finished(output: Path) -> bool:
    """Whether an output that has a state beside it is nevertheless whole: the kill came just before the state went."""
    try:
        return exists(state_path(output)) and read_record(output) == read_state(state_path(output)).record
    except (RequestError, OSError, ValueError):  # ValueError: a path without a name, as `.`
        return False


def unfinished(folder: Path, record: dict[str, Any], any_seed: bool) -> list[Saved]:
    """Runs in a folder that this record would go on with, under names that the program chose; the furthest first."""
    found = []
    for path in folder.glob(f"*{STATE}"):
        with contextlib.suppress(RequestError, OSError):
            saved = read_state(path)
            if saved.automatic and not differences(saved.record, record, any_seed):
                found.append(saved)
    return sorted(found, key=lambda saved: (-saved.done, saved.path.name))


# --- a run -----------------------------------------------------------------------------------------------------------
class RunState:
    """One run, its output's name claimed: `with` it, `keep` each step, `finish` the steps, `close` when all is done.

    Left by an exception it writes what is done since the last saving, and says so in a note on that exception.
    """

    def __init__(
        self, output: Path, record: dict[str, Any], held: claim.Claim, *, steps: int, save_every: float, automatic: bool
    ) -> None:
        self.output, self.record, self.steps = output, record, steps
        self.path = state_path(output)
        self.begun: Progress | None = None
        self.finished = False  # the output is whole already
        self.repacked = False  # the state on disk is of a run that was to be packed otherwise
        self.saved = 0  # steps on disk
        self.trouble: str | None = None  # why the last saving failed
        self._claim, self._save_every, self._automatic = held, save_every, automatic
        self._latest: Progress | None = None
        self._computed: Any = None  # on a GPU, when the latest is
        self._last = time.monotonic()
        self._writer: threading.Thread | None = None

    @property
    def lead(self) -> tuple[Path, dict[str, Any], int, bool, Progress | None]:
        """What a `Follower` is made of."""
        return self.output, self.record, self.steps, self.finished, self.begun

    def keep(self, progress: Progress) -> None:
        """A step is done. Every `save_every` seconds this starts a saving, which waits for nothing and is not waited
        for."""
        self._latest, self._computed = progress, _ready(progress)
        due = time.monotonic() - self._last >= self._save_every
        if due and not (self._writer and self._writer.is_alive()):
            self._last = time.monotonic()
            self._writer = threading.Thread(target=self._save, args=(progress, self._computed), daemon=True)
            self._writer.start()

    def finish(self, latents: "Tensor") -> None:
        """The last step is done: the latents alone, on the disk when this returns unless `trouble` says why not."""
        if self.repacked or not (self.begun and self.begun.done == self.steps):
            if self._writer:
                self._writer.join()
            self._latest = Progress(self.steps, latents, {})
            self.saved = min(self.saved, self.steps - 1)  # instead of one with the solver's memory, or packed otherwise
            self._save_now()

    def close(self, keep_latents: bool = False) -> None:
        """The output is whole: no state is left, but for the latents where they are asked for."""
        if keep_latents and exists(self.path):
            os.replace(self.path, latents_path(self.output))
        self.discard()
        self._latest, self.finished = None, True

    def discard(self) -> None:
        """Nothing that was done shall be gone on with."""
        if self._writer:
            self._writer.join()
        self._latest = None
        self.path.unlink(missing_ok=True)
        beside(self.output, PREVIEW).unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        try:
            if error is not None and not self.finished:
                self._save_now()
                for note in self._notes():
                    error.add_note(note)
        finally:
            self._claim.release()

    def rescue(self) -> list[str]:
        """Save what is done, from a thread, where the run itself is stuck and never comes to an end; notes."""
        if self._latest is None or self.finished:
            return []
        if self._writer:
            self._writer.join()
        if self._latest.done > self.saved:
            self._save(self._latest, self._computed)
        return self._notes()

    def _notes(self) -> list[str]:
        notes = [f"the last steps could not be kept: {self.trouble}"] if self.trouble else []
        if self.saved:
            notes.append(f"kept in {self.path}: step {self.saved} of {self.steps}; the same command goes on")
        return notes

    def _save_now(self) -> None:
        if self._writer:
            self._writer.join()
        if self._latest and self._latest.done > self.saved:
            self._save(self._latest, None)

    def _save(self, progress: Progress, ready: Any) -> None:
        try:
            latents, named = _named_tensors(progress)
            metadata = {
                "wan22": json.dumps(self.record),
                "state": json.dumps({"done": progress.done, "steps": self.steps, "automatic": self._automatic,
                                     "solver": named, "computed": [index for index, _ in progress.computed]}),
            }  # fmt: skip
            partial = self.path.with_name(staging_prefix(self.output) + "state")
            _write(partial, _on_cpu(latents, ready), metadata)
            os.replace(partial, self.path)
            sync_entry(self.path)
            self.saved, self.trouble = progress.done, None
        except OSError as error:
            self.trouble = reason(error)
        except RuntimeError as error:  # a GPU that is no more
            self.trouble = str(error).partition("\n")[0]
        if self.trouble:
            with contextlib.suppress(OSError):
                self.path.with_name(staging_prefix(self.output) + "state").unlink(missing_ok=True)


class Follower(RunState):
    """The run of another process, which keeps its state: here nothing is written, and nothing is held."""

    def __init__(self, leader: tuple[Path, dict[str, Any], int, bool, Progress | None]) -> None:
        self.output, self.record, self.steps, self.finished, self.begun = leader
        self.path, self.saved, self.trouble = state_path(self.output), 0, None

    def keep(self, progress: Progress) -> None: ...

    def finish(self, latents: "Tensor") -> None: ...

    def close(self, keep_latents: bool = False) -> None: ...

    def discard(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None: ...


def begin_given(output: Path, record: dict[str, Any], *, any_seed: bool, overwrite: bool, **settings: Any) -> RunState:
    """A run whose output has the name that was asked for; it goes on where its state says so.

    Raises Busy, and RequestError where the state is another request's and `overwrite` is not set.
    """
    if (held := _take(output)) is None:
        who = claim.holder(claim_path(output)) or "another process"
        raise Busy(f"{output}: {who} is at work on it", hint="wait for it, or name another --output")
    try:
        run = RunState(output, record, held, automatic=False, **settings)
        _clear_staging(output)
        if exists(run.path):
            try:
                saved = read_state(run.path)
                if found := differences(saved.record, record, any_seed):
                    raise RequestError(
                        f"{run.path}: belongs to another run: {'; '.join(found)}",
                        hint=OVERWRITE)  # fmt: skip
                _go_on(run, saved)
            except RequestError:
                if not overwrite:
                    raise
                run.path.unlink()
    except BaseException:
        held.release()
        raise
    return run


def begin_automatic(
    name: Path, record: dict[str, Any], *, any_seed: bool, **settings: Any
) -> RunState:
    """A run that may be called `name`: an unfinished one beside it that matches, or a new one with the first free
    number."""
    folder = name.parent
    _sweep(folder)
    for saved in unfinished(folder, record, any_seed):
        output = folder / (saved.path.name.removesuffix(STATE) + ".mp4")
        if held := _take(output):
            run = RunState(output, record, held, automatic=True, **settings)
            try:
                _go_on(run, read_state(run.path))
            except (RequestError, OSError):  # finished, and gone, since we looked
                held.release()
                continue
            _clear_staging(output)
            return run
    for output in numbered(name):
        if exists(output) or exists(state_path(output)) or not (held := _take(output)):
            continue
        if not exists(output):
            _clear_staging(output)
            return RunState(output, record, held, automatic=True, **settings)
        held.release()  # finished since we looked
    raise AssertionError


def _take(output: Path) -> claim.Claim | None:
    """The claim on an output, in a folder that may have to be made; None where another process holds it. Raises
    RunError."""
    try:
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
        return claim.take(claim_path(output))
    except OSError as error:
        raise not_written(output, error) from None


def claim_path(output: Path) -> Path:
    return beside(output, CLAIM, hidden=True)


def _go_on(run: RunState, saved: Saved) -> None:
    # How the file is packed comes after all that the state holds: it is as asked for now.
    asked = run.record.get("encoding")
    run.finished = is_finished(run.output)
    run.repacked = not run.finished and saved.record.get("encoding") != asked
    run.record = {**saved.record, "encoding": asked} if run.repacked else saved.record
    run.begun = saved.progress()
    run.saved = saved.done


def _clear_staging(output: Path) -> None:
    """What a killed process was making `output` in. Only for who holds its claim."""
    prefix = staging_prefix(output)
    for left in [path for path in output.absolute().parent.iterdir() if path.name.startswith(prefix)]:
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _sweep(folder: Path) -> None:
    """Clear up after killed processes whose runs nobody may ever go on with: their seed was drawn, and is lost."""
    for path in folder.glob(f".*{CLAIM}"):
        output = folder / (path.name[1:].removesuffix(CLAIM) + ".mp4")
        with contextlib.suppress(OSError):
            if claim.holder(path) is None and (held := claim.take(path)):
                _clear_staging(output)
                held.release()


# --- writing ---------------------------------------------------------------------------------------------------------
def _named_tensors(progress: Progress) -> "tuple[dict[str, Tensor], dict[str, Any]]":
    """All tensors by name, and the solver's memory with these names in their places."""
    computed = {COMPUTED.format(place): latents for place, (_, latents) in enumerate(progress.computed)}
    tensors = {"latents": progress.latents} | computed

    def name_it(name: str, value: Any) -> Any:
        if value is None or isinstance(value, int):
            return value
        tensors[name] = value
        return name

    named = {
        name: [name_it(f"{name}.{index}", item) for index, item in enumerate(value)]
        if isinstance(value, list) else name_it(name, value)
        for name, value in progress.solver.items()
    }  # fmt: skip
    return tensors, named


def _ready(progress: Progress) -> Any:
    """On a GPU, the moment at which the latents will have been computed: the thread waits for it, the run does not."""
    if progress.latents.device.type != "cuda":
        return None
    import torch

    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(progress.latents.device))
    return event


def _on_cpu(tensors: "dict[str, Tensor]", ready: Any) -> "Iterator[tuple[str, torch.Tensor]]":
    """The tensors, contiguous, one after another; on a stream of their own where the run must not be waited for."""
    import torch

    device = tensors["latents"].device
    for name, tensor in tensors.items():
        if ready is None or tensor.device.type == "cpu":
            yield name, tensor.detach().cpu().contiguous()
            continue
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            stream.wait_event(ready)
            copy = tensor.to("cpu")
        yield name, copy.contiguous()


def _write(path: Path, tensors: "Iterator[tuple[str, torch.Tensor]]", metadata: dict[str, str]) -> None:
    """A safetensors file, through to the disk. Raises OSError.

    Not the library's writer: that copies every tensor once more and holds the interpreter's lock while it writes, for
    which the run would wait.
    """
    import torch

    kinds = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.int64: "I64"}
    whole = list(tensors)
    table: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in whole:
        start, end = end, end + tensor.nbytes
        table[name] = {"dtype": kinds[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in whole:
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
    sync(path)
