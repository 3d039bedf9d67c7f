"""Many requests, made by workers that load the weights once (many/worker.py): processes, or actors of a Ray cluster.

The parent reads no weight. It hands out one item at a time, replaces a worker that dies, and sets an item aside that
was being made at two deaths. Who makes an item claims its output (state.py), so that several batches over one folder,
on one host or many, share the work.
"""

import functools
import json
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TextIO

from wan22 import plan
from wan22.capability import resolve
from wan22.config import DEFAULT_TASK, DoesNotFit, Precision, Request, RequestError, RunError
from wan22.many import claim
from wan22.many.items import Bad, Item
from wan22.many.journal import Journal
from wan22.many.worker import Work, mesh_of
from wan22.options import Base, Flags, read_checkpoint, read_placement, read_precision
from wan22.output.names import CLAIM, STATE, beside, exists
from wan22.output.record import read_record

DEATHS = 2  # of workers over one item, until it is set aside
LOSSES = 5  # of machines under it, which are seldom its fault
TRIES = 2  # of an item that failed for what may pass: the second after all others
PAUSE = 5.0  # seconds without a new item where the disk is full; twice as many the next time
PATIENCE = 900.0  # seconds of such pauses in a row, until a full disk counts as a failure
POLL = 1.0  # seconds between two looks at what others are making

Tell = Callable[..., None]  # event, **data


@dataclass
class Job:
    """An item under its output's name."""

    name: str
    item: Item
    deaths: int = 0
    losses: int = 0
    tries: int = 0


@dataclass(frozen=True)
class Outcome:
    """What became of an item or a line: `done`, `there` (made before, or by another batch), `failed`, `bad`."""

    name: str  # or where it stands, of a bad one
    what: str
    error: str = ""


class Worker(Protocol):
    """One that makes videos, wherever it is: as many/local.py's."""

    ready: bool
    job: Job | None
    last_words: str | None  # why it dies, where it could say so

    @property
    def who(self) -> int | str | None: ...
    def give(self, name: str, request: Request) -> None: ...
    def hear(self) -> Iterable[tuple[str, dict[str, Any]]]: ...
    def death(self) -> str | None: ...
    def guilty(self) -> bool: ...
    def terminate(self) -> None: ...
    def stop(self) -> None: ...


class Engine(Protocol):
    """Where workers come from: as many/local.py's. devices: one a worker, or the several of one; work: what all are
    told, its settings definite where the cards are elsewhere."""

    devices: list[str]
    work: Work

    def start(self, place: int, ahead: Sequence[Request], /) -> Any: ...
    def wait(self, workers: Any, seconds: float, /) -> list[Any]: ...
    def trouble(self) -> str | None: ...
    def close(self) -> None: ...


def plan_jobs(
    items: list[Item], bad: list[Bad], flags: Flags, base: Base, elsewhere: str | None = None, gpus: int = 1
) -> tuple[list[Job], list[Bad]]:
    """Every item's name, and what turns out bad once the checkpoint is known. Reads headers only. elsewhere: the kind
    of device (`cpu`, `cuda`) where the workers are not on this machine; gpus: of each of them. Raises RequestError, and
    DoesNotFit where the machine holds none of them.
    """
    from wan22.pipeline import _device, find_adapters, resolve_precision, video_name

    checkpoint, placement = read_checkpoint(flags, base, DEFAULT_TASK), read_placement(flags, base)
    asked = read_precision(flags, base)
    precision = resolve(asked, elsewhere, None) if elsewhere else resolve_precision(asked, _device(placement.device))
    identity = checkpoint.identity()
    adapters, jobs, bad = find_adapters(checkpoint, placement), [], list(bad)
    sizes, too_large = plan.Sizes.of(checkpoint), None
    mesh_of(placement, gpus, Request("x"), sizes)  # what no request makes possible

    @functools.cache
    def check(request: Request) -> None:
        shares = mesh_of(placement, gpus, request, sizes)[1]
        if not elsewhere:
            plan.require_here(request, precision, placement, sizes, shares)

    for item in items:
        try:
            _check_record(item, precision, identity)
            check(replace(item.request, prompt="x", seed=0))  # asked once for all that are alike
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
    if item.record and item.record.get("precision") != (here := precision.to_dict()):
        there = item.record.get("precision")
        there = there if isinstance(there, dict) else {}
        flags = {"weights": "--dtype", "vae": "--vae-dtype"}
        said = [f"{flags.get(name, f'--{name}').replace('_', '-')} {there.get(name)}, not {value}"
                for name, value in here.items() if there.get(name) != value]  # fmt: skip
        raise RequestError(f"it was made with {'; '.join(said)}")


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


# --- the parent ------------------------------------------------------------------------------------------------------
class Batch:
    """One run over a folder."""

    def __init__(self, jobs: list[Job], folder: Path, engine: Engine, tell: Tell) -> None:
        """tell is called with every event, and its data by name."""
        self.folder, self.engine, self._tell = folder, engine, tell
        self.outcomes: list[Outcome] = []
        self.pending = deque(jobs)
        self.elsewhere: list[Job] = []  # being made by another batch
        self.workers: list[Worker] = []
        self.stillborn = 0  # workers in a row that died before they were ready
        self.pause, self.paused, self.pause_ends = PAUSE, 0.0, 0.0  # the next; all in a row; the present one's end
        folder.mkdir(parents=True, exist_ok=True)
        self.journal = Journal(folder)

    def run(self, bad: list[Bad]) -> list[Outcome]:
        """Make everything. Raises WanError where no worker can, and what interrupts it once the workers have gone."""
        workers, run = len(self.engine.devices), self.engine.work.run
        self.journal.add("begin", items=len(self.pending), workers=workers, run=run)
        for one in bad:
            self._say("bad", where=one.where, error=one.error)
            self.outcomes.append(Outcome(one.where, "bad", one.error))
        for job in self.pending:
            self.journal.add("item", name=job.name, where=job.item.where, request=changes(job.item.request))
        total = len(self.pending)
        todo = [job for job in self.pending if not self._is_there(job)]
        self.pending = deque(todo)
        try:
            for place in range(min(len(self.engine.devices), len(todo))):
                self.workers.append(self._start(place))
            while self.pending or self.elsewhere or any(worker.job for worker in self.workers):
                self._turn()
        except BaseException as error:
            for worker in self.workers:
                worker.terminate()
            if isinstance(error, SystemExit):
                over = len(self.outcomes) - len(bad)
                error.add_note(f"{over} of {total} items are over; the same command goes on")
            raise
        finally:
            for worker in self.workers:
                worker.stop()
            self.journal.add("end")
            self.journal.close()
        return self.outcomes

    def _turn(self) -> None:
        for worker in self.workers:
            if worker.ready and not worker.job and self.pending and time.monotonic() >= self.pause_ends:
                self._give(worker, self.pending.popleft())
        for worker in self.engine.wait(self.workers, POLL):
            if worker in self.workers:  # not replaced a moment ago
                self._listen(worker)
        if not any(worker.ready for worker in self.workers) and (trouble := self.engine.trouble()):
            self._tell("waiting", text=trouble)
        if not self.pending:
            self._look_elsewhere()

    def _give(self, worker: Worker, job: Job) -> None:
        worker.job = job
        worker.give(job.name, job.item.request)

    def _listen(self, worker: Worker) -> None:
        why = worker.death()  # before its last words are heard: a death in between is found in the next turn
        for kind, data in worker.hear():
            self._hear(worker, kind, data)
        if why:
            self._bury(worker, why)

    def _hear(self, worker: Worker, kind: str, data: dict[str, Any]) -> None:
        if kind == "ready":
            worker.ready, self.stillborn = True, 0
            return
        if kind == "fatal":
            kinds = {kind.exit_code: kind for kind in (RunError, RequestError, DoesNotFit)}
            raise kinds[data["code"]](data["message"], data["hint"])
        if kind == "dying":
            worker.last_words = data["why"]
            return
        job = worker.job
        assert job
        if kind == "event":
            self._tell(data.pop("event"), name=job.name, **data)
            return
        if kind == "start":
            self._say("start", name=job.name, worker=worker.who)
            return
        worker.job = None
        if kind == "busy":
            self.elsewhere.append(job)
        elif kind == "there":
            self._end(job, "there")
        elif kind == "done":
            self.pause, self.paused = PAUSE, 0.0
            self._end(job, "done", seconds=data["seconds"])
        elif data["full"] and self.paused < PATIENCE:
            self.pending.appendleft(job)
            if time.monotonic() >= self.pause_ends:  # not what another worker met in the same moment
                self._say("waiting", text=f"{data['error']}; going on in {self.pause:.0f} s")
                self.pause_ends = time.monotonic() + self.pause
                self.paused, self.pause = self.paused + self.pause, min(2 * self.pause, 60.0)
        else:
            job.tries += 1
            if data["may_pass"] and job.tries < TRIES:
                self._say("retry", name=job.name, error=data["error"])
                self.pending.append(job)
            else:
                self._end(job, "failed", error=data["error"])

    def _bury(self, worker: Worker, why: str) -> None:
        """A worker is dead: what it was making goes to another, and another takes its place."""
        job, place, why = worker.job, self.workers.index(worker), worker.last_words or why
        self._say("died", name=job.name if job else None, worker=worker.who, why=why)
        if job:
            if worker.guilty():
                job.deaths += 1
            else:
                job.losses += 1
            if job.deaths >= DEATHS or job.losses >= LOSSES:
                if held := claim.take(beside(self.folder / job.name, CLAIM, hidden=True)):  # the dead one's
                    held.release()
                self._end(job, "failed", error=f"{job.deaths + job.losses} workers died over it: {why}")
            else:
                self.pending.appendleft(job)
        if not worker.ready and worker.guilty():
            self.stillborn += 1
            if self.stillborn >= 3:
                raise RunError(f"workers die before they begin: {why}")
        worker.stop()
        self.workers[place] = self._start(place)

    def _start(self, place: int) -> Worker:
        return self.engine.start(place, [job.item.request for job in self.pending])

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


def changes(request: Request) -> dict[str, Any]:
    """A request's prompt, and those settings that are not the defaults."""
    plain = Request("x").with_boundary().to_dict()
    asked = request.with_boundary().to_dict()
    return {name: value for name, value in asked.items() if name == "prompt" or value != plain[name]}


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
            "died": f"a worker died ({data.get('why')}); another takes its place",
            "waiting": str(data.get("text")),
            "warning": f"warning: {name}: {data.get('text')}",
        }
        if event in said:
            print(said[event], file=sys.stderr)

    return tell


def json_lines(out: TextIO, event: str, **data: Any) -> None:
    """Says everything to a program, one JSON object a line."""
    print(json.dumps({"event": event, **data}, ensure_ascii=False), file=out, flush=True)


def table(outcomes: list[Outcome]) -> str:
    """How it went, for a person: the counts, and a row for all that is missing."""
    counts = Counter(outcome.what for outcome in outcomes)
    words = {"done": "made", "there": "there already", "failed": "failed", "bad": "bad"}
    said = [f"{counts[what]} {word}" for what, word in words.items() if counts[what]]
    wrong = [outcome for outcome in outcomes if outcome.what in ("failed", "bad")]
    width = max((len(outcome.name) for outcome in wrong), default=0)
    rows = [f"  {outcome.what:<7}{outcome.name:<{width}}  {' '.join(outcome.error.split())}" for outcome in wrong]
    return "\n".join([", ".join(said), *rows])
