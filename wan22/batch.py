"""Many requests: one worker process a GPU (or several on a CPU), each of which loads the weights once.

The parent reads no weight. It hands out one item at a time, restarts a worker that dies, and sets an item aside that
was being made at two deaths. Who makes an item claims its output (state.py), so that several batches over one folder,
on one host or many, share the work. A worker that loses its parent keeps its state and goes.
"""

import contextlib
import functools
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing import connection
from pathlib import Path
from typing import Any, NoReturn

from wan22 import claim, plan
from wan22.config import DEFAULT_TASK, DoesNotFit, Placement, Precision, Request, RequestError, RunError, WanError
from wan22.items import Bad, Item
from wan22.journal import Journal
from wan22.names import CLAIM, STATE, beside, exists
from wan22.options import Base, Flags, read_checkpoint, read_encoding, read_placement, read_precision
from wan22.record import read_record
from wan22.report import Reporter

DEATHS = 2  # of workers over one item, until it is set aside
TRIES = 2  # of an item that failed for what may pass, as a full disk: the second after all others
POLL = 1.0  # seconds between two looks at what others are making
GRACE = 120.0  # seconds for a worker to keep its state

Tell = Callable[..., None]  # event, **data


@dataclass
class Job:
    """An item under its output's name."""

    name: str
    item: Item
    deaths: int = 0
    tries: int = 0


@dataclass(frozen=True)
class Outcome:
    """What became of an item or a line: `done`, `there` (made before, or by another batch), `failed`, `bad`."""

    name: str  # or where it stands, of a bad one
    what: str
    error: str = ""


def plan_jobs(items: list[Item], bad: list[Bad], flags: Flags, base: Base) -> tuple[list[Job], list[Bad]]:
    """Every item's name, and what turns out bad once the checkpoint is known. Reads headers only. Raises RequestError,
    and DoesNotFit where the machine holds none of them.
    """
    from wan22.pipeline import _device, find_adapters, resolve_precision, video_name

    checkpoint, placement = read_checkpoint(flags, base, DEFAULT_TASK), read_placement(flags, base)
    precision = resolve_precision(read_precision(flags, base), _device(placement.device))
    identity = checkpoint.identity()
    adapters, jobs, bad = find_adapters(checkpoint, placement), [], list(bad)
    sizes, too_large = plan.Sizes.of(checkpoint), None
    fits = functools.lru_cache(None)(lambda request: plan.require_here(request, precision, placement, sizes))
    for item in items:
        try:
            _check_record(item, precision, identity)
            fits(replace(item.request, prompt="x", seed=0))  # asked once for all that are alike
            resolved = replace(item.request, loras=adapters.resolve(item.request.loras))
        except (RequestError, DoesNotFit) as error:
            too_large = error if isinstance(error, DoesNotFit) else too_large
            bad.append(Bad(item.where, str(error)))
            continue
        jobs.append(Job(video_name(Path(), resolved, precision, identity).name, item))
    if too_large and not jobs:
        raise too_large
    return jobs, bad


def _check_record(item: Item, precision: Precision, identity: str) -> None:
    if item.record and item.record.get("checkpoint") != identity:
        raise RequestError("it was made with another checkpoint")
    if item.record and item.record.get("precision") != precision.to_dict():
        raise RequestError(f"it was made with {item.record.get('precision')}, not {precision.to_dict()}")


def parse_shard(text: str | None) -> tuple[int, int]:
    """`2/8` → (1, 8): the part to make, from 0, and how many there are. Without one, a SLURM array's task where the
    array is evenly numbered; elsewhere all, which claims share out. Raises RequestError."""
    if text:
        part, _, parts = text.partition("/")
        if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
            raise RequestError(f"--shard {text}: not a part", hint="say 1/8 for the first of eight")
        return int(part) - 1, int(parts)
    try:
        task, count, first, last, step = (
            int(os.environ.get(f"SLURM_ARRAY_TASK_{name}", default))
            for name, default in (("ID", ""), ("COUNT", ""), ("MIN", "0"), ("MAX", "-1"), ("STEP", "1"))
        )
    except ValueError:
        return 0, 1
    last = last if last >= 0 else first + (count - 1) * step
    even = step > 0 and (last - first) // step + 1 == count
    return ((task - first) // step, count) if even else (0, 1)


def count_workers(wanted: int | None, placement: Placement) -> list[str]:
    """The devices of the workers. Raises RequestError."""
    import torch

    if wanted is not None and wanted < 1:
        raise RequestError(f"--workers {wanted}: at least one is needed")
    if placement.device == "cpu" or (placement.device == "auto" and not torch.cuda.is_available()):
        return ["cpu"] * (wanted or 1)
    devices = [placement.device] if ":" in placement.device else [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if wanted and wanted > len(devices):
        raise RequestError(f"--workers {wanted}: there are {len(devices)} GPUs for them", hint="one worker a GPU")
    return devices[:wanted]


# --- the parent ------------------------------------------------------------------------------------------------------
class Batch:
    """One run over a folder."""

    def __init__(self, jobs: list[Job], folder: Path, devices: list[str], flags: Flags, base: Base, tell: Tell) -> None:
        """tell is called with every event, and its data by name."""
        self.folder, self.devices, self.flags, self.base, self._tell = folder, devices, flags, base, tell
        self.outcomes: list[Outcome] = []
        self.pending = deque(jobs)
        self.elsewhere: list[Job] = []  # being made by another batch
        self.workers: list[_Worker] = []
        self.stillborn = 0  # workers in a row that died before they were ready
        folder.mkdir(parents=True, exist_ok=True)
        self.journal = Journal(folder)

    def run(self, bad: list[Bad]) -> list[Outcome]:
        """Make everything. Raises WanError where no worker can, and what interrupts it once the workers have gone."""
        self.journal.add("begin", items=len(self.pending), workers=len(self.devices))
        for one in bad:
            self._say("bad", where=one.where, error=one.error)
            self.outcomes.append(Outcome(one.where, "bad", one.error))
        for job in self.pending:
            self.journal.add("item", name=job.name, where=job.item.where, request=changes(job.item.request))
        todo = [job for job in self.pending if not self._is_there(job)]
        self.pending = deque(todo)
        try:
            for device in self.devices[: len(todo)]:
                self.workers.append(self._start(device))
            while self.pending or self.elsewhere or any(worker.job for worker in self.workers):
                self._turn()
        except BaseException:
            for worker in self.workers:
                worker.process.terminate()
            raise
        finally:
            for worker in self.workers:
                worker.stop()
            self.journal.add("end")
            self.journal.close()
        return self.outcomes

    def _turn(self) -> None:
        for worker in self.workers:
            if worker.ready and not worker.job and self.pending:
                self._give(worker, self.pending.popleft())
        waitable = {thing: worker for worker in self.workers for thing in (worker.pipe, worker.process.sentinel)}
        for thing in connection.wait(list(waitable), POLL):
            worker = waitable[thing]  # type: ignore[index]
            if worker in self.workers:  # not replaced a moment ago
                self._listen(worker)
        if not self.pending:
            self._look_elsewhere()

    def _give(self, worker: "_Worker", job: Job) -> None:
        worker.job = job
        with contextlib.suppress(OSError):  # a dead one is noticed by its sentinel
            worker.pipe.send((job.name, job.item.request))

    def _listen(self, worker: "_Worker") -> None:
        with contextlib.suppress(EOFError, OSError):
            while worker.pipe.poll():
                self._hear(worker, *worker.pipe.recv())
        if worker in self.workers and not worker.process.is_alive():
            self._bury(worker)

    def _hear(self, worker: "_Worker", kind: str, data: dict[str, Any]) -> None:
        if kind == "ready":
            worker.ready, self.stillborn = True, 0
            return
        if kind == "fatal":
            kinds = {kind.exit_code: kind for kind in (RunError, RequestError, DoesNotFit)}
            raise kinds[data["code"]](data["message"], data["hint"])
        job = worker.job
        assert job
        if kind == "event":
            self._tell(data.pop("event"), name=job.name, **data)
            return
        if kind == "start":
            self._say("start", name=job.name, worker=worker.process.pid)
            return
        worker.job = None
        if kind == "busy":
            self.elsewhere.append(job)
        elif kind == "there":
            self._end(job, "there")
        elif kind == "done":
            self._end(job, "done", seconds=data["seconds"])
        else:
            job.tries += 1
            if data["may_pass"] and job.tries < TRIES:
                self._say("retry", name=job.name, error=data["error"])
                self.pending.append(job)
            else:
                self._end(job, "failed", error=data["error"])

    def _bury(self, worker: "_Worker") -> None:
        """A worker is dead: what it was making goes to another, and another takes its place."""
        job, index = worker.job, self.workers.index(worker)
        worker.pipe.close()
        self._say("died", name=job.name if job else None, worker=worker.process.pid, code=worker.process.exitcode)
        if job:
            job.deaths += 1
            if job.deaths >= DEATHS:
                self._end(job, "failed", error=f"{DEATHS} workers died over it")
            else:
                self.pending.appendleft(job)
        if not worker.ready:
            self.stillborn += 1
            if self.stillborn >= 3:
                raise RunError(f"workers die before they begin (exit code {worker.process.exitcode})")
        self.workers[index] = self._start(worker.device)

    def _start(self, device: str) -> "_Worker":
        ahead = [job.item.request for job in self.pending]
        threads = max(1, (os.cpu_count() or 1) // len(self.devices)) if len(self.devices) > 1 else 0
        return _Worker(device, (dict(self.flags), self.base, device, threads, self.folder, ahead))

    def _look_elsewhere(self) -> None:
        for job in list(self.elsewhere):
            if self._is_there(job):
                self.elsewhere.remove(job)
            elif claim.holder(beside(self.folder / job.name, CLAIM, hidden=True)) is None:
                self.elsewhere.remove(job)
                self.pending.append(job)

    def _is_there(self, job: Job) -> bool:
        """Whether it is finished, with no state beside it: with one, a worker tidies up. Another file under its name is
        a failure."""
        output = self.folder / job.name
        if not exists(output) or exists(beside(output, STATE)):
            return False
        try:
            read_record(output)
        except RequestError as error:
            self._end(job, "failed", error=str(error))
        else:
            self._end(job, "there")
        return True

    def _end(self, job: Job, what: str, **data: Any) -> None:
        self.outcomes.append(Outcome(job.name, what, data.get("error", "")))
        self._say(what, name=job.name, where=job.item.where, **data)

    def _say(self, event: str, **data: Any) -> None:
        self.journal.add(event, **data)
        self._tell(event, **data)


class _Worker:
    """A process, the pipe to it, and what it is making."""

    def __init__(self, device: str, arguments: tuple[Any, ...]) -> None:
        context = multiprocessing.get_context("spawn")  # a forked process cannot use a GPU that its parent looked at
        self.pipe, theirs = context.Pipe()
        self.device = device
        self.ready = False
        self.job: Job | None = None
        self.process = context.Process(target=work, args=(theirs, *arguments), daemon=False)
        self.process.start()
        theirs.close()

    def stop(self) -> None:
        """Let it go, once it has kept what it holds."""
        with contextlib.suppress(OSError):
            self.pipe.send(None)
        self.process.join(GRACE)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.pipe.close()


def changes(request: Request) -> dict[str, Any]:
    """A request's prompt, and those settings that are not the defaults."""
    plain = Request("x").to_dict()
    return {name: value for name, value in request.to_dict().items() if name == "prompt" or value != plain[name]}


# --- a worker --------------------------------------------------------------------------------------------------------
class _PipeReporter(Reporter):
    """Sends steps and warnings to the parent."""

    def __init__(self, pipe: Any) -> None:
        super().__init__()
        self._pipe = pipe

    def note(self, text: str, **data: Any) -> None:
        if data:
            self._pipe.send(("event", {"event": "note", "text": text, **data}))

    def warn(self, text: str) -> None:
        self._pipe.send(("event", {"event": "warning", "text": text}))

    def step(self, index: int, expert: str, timestep: float) -> None:
        self._pipe.send(("event", {"event": "step", "step": index + 1, "timestep": timestep, "expert": expert}))


def work(
    pipe: Any, flags: dict[str, Any], base: Base, device: str, threads: int, folder: Path, ahead: list[Request]
) -> None:
    """A worker's life: open the checkpoint, encode the prompts ahead together, then make what it is given."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, who then terminates us
    signal.signal(signal.SIGTERM, _go)
    threading.Thread(target=_follow_parent, daemon=True).start()
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    with contextlib.suppress(EOFError, BrokenPipeError):  # the parent has gone
        try:
            import torch

            from wan22.pipeline import Pipeline

            if threads:
                torch.set_num_threads(threads)
            placement = replace(read_placement(flags, base), device=device)
            checkpoint, precision = read_checkpoint(flags, base, DEFAULT_TASK), read_precision(flags, base)
            pipeline = Pipeline(checkpoint, precision, placement, read_encoding(flags, base))
            texts = [text for request in ahead for text in _texts(request)]
            pipeline.encode(list(dict.fromkeys(texts)), Reporter())
        except WanError as error:
            pipe.send(("fatal", {"message": str(error), "hint": error.hint, "code": error.exit_code}))
            return
        pipe.send(("ready", {}))
        while (given := pipe.recv()) is not None:
            name, request = given
            _make(pipe, pipeline, folder / name, request, bool(flags["keep_latents"]))


def _texts(request: Request) -> tuple[str, ...]:
    """The texts that a request needs encoded: the negative prompt only where some step is guided."""
    guided = {request.guidance_high, request.guidance_low, request.guidance_lead if request.lead_steps else 1} != {1}
    return (request.prompt, request.negative_prompt) if guided else (request.prompt,)


def _make(pipe: Any, pipeline: Any, output: Path, request: Request, keep_latents: bool) -> None:
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
            pipeline.generate_file(request, state, "error", keep_latents, _PipeReporter(pipe))
    except Busy:
        pipe.send(("busy", {}))
    except WanError as error:
        pipe.send(("failed", {"error": str(error), "may_pass": isinstance(error, RunError)}))
    except (EOFError, BrokenPipeError):
        raise
    except Exception as error:
        pipe.send(("failed", {"error": f"{type(error).__name__}: {error}", "may_pass": False}))
        if type(error).__name__ != "OutOfMemoryError":
            raise SystemExit(1) from error  # what else it broke is not known: the next one begins anew
    else:
        pipe.send(("done", {"seconds": round(time.perf_counter() - start, 3)}))


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent:
        connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)


def _go(signum: int, frame: object) -> NoReturn:
    raise SystemExit(143)


# --- what is said ----------------------------------------------------------------------------------------------------
def console(total: int) -> Tell:
    """Says to a person what is finished or fails, a line each, on stderr."""
    seen: set[str] = set()

    def tell(event: str, **data: Any) -> None:
        name = str(data.get("name") or data.get("where"))
        if event in ("done", "there", "failed"):
            seen.add(name)
        place = f"[{len(seen)}/{total}]"
        said = {
            "done": f"{place} {name}  {data.get('seconds')} s",
            "there": f"{place} {name}  is there",
            "failed": f"{place} {name}  failed: {data.get('error')}",
            "bad": f"{name}: {data.get('error')}",
            "retry": f"{name}  failed, once more later: {data.get('error')}",
            "died": f"a worker died (exit code {data.get('code')}); another takes its place",
            "warning": f"warning: {name}: {data.get('text')}",
        }
        if event in said:
            print(said[event], file=sys.stderr)

    return tell


def json_lines(event: str, **data: Any) -> None:
    """Says everything to a program, one JSON object a line."""
    print(json.dumps({"event": event, **data}, ensure_ascii=False), flush=True)


def table(outcomes: list[Outcome]) -> str:
    """How it went, for a person: the counts, and a row for all that is missing."""
    counts = Counter(outcome.what for outcome in outcomes)
    words = {"done": "made", "there": "there already", "failed": "failed", "bad": "bad"}
    said = [f"{counts[what]} {word}" for what, word in words.items() if counts[what]]
    wrong = [outcome for outcome in outcomes if outcome.what in ("failed", "bad")]
    width = max((len(outcome.name) for outcome in wrong), default=0)
    rows = [f"  {outcome.what:<7}{outcome.name:<{width}}  {' '.join(outcome.error.split())}" for outcome in wrong]
    return "\n".join([", ".join(said), *rows])
