"""The engine `local`: one worker process a GPU, or several on a CPU, on this machine.

A worker that loses its parent keeps its state and goes.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from multiprocessing import connection
from typing import Any

from wan22.config import Placement, Request, RequestError
from wan22.many.group import live_together
from wan22.many.worker import GRACE, Work
from wan22.signals import never_swallowed, stop


def count_workers(wanted: int | None, placement: Placement, gpus: int = 1) -> list[str]:
    """The devices of the workers; of one that has several `gpus`, their names as CUDA_VISIBLE_DEVICES takes them.
    Raises RequestError."""
    import torch

    if wanted is not None and wanted < 1:
        raise RequestError(f"--workers {wanted}: at least one is needed")
    if placement.device == "cpu" or (placement.device == "auto" and not torch.cuda.is_available()):
        return ["cpu"] * (wanted or 1)
    devices = [placement.device] if ":" in placement.device else [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if gpus > 1:
        there = len(devices)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(there)))
        cards = [card.strip() for card in visible.split(",")][:there]
        devices = [",".join(cards[first : first + gpus]) for first in range(0, there - gpus + 1, gpus)]
        if not devices:
            raise RequestError(f"--gpus-per-worker {gpus}: there {'is' if there == 1 else 'are'} {there} here")
    if wanted and wanted > len(devices):
        room, each = ("worker", f", {gpus} GPUs each") if gpus > 1 else ("GPU", "")
        there_are = f"there {'is' if len(devices) == 1 else 'are'} {len(devices)}"
        raise RequestError(f"--workers {wanted}: {there_are} {room}{'s' * (len(devices) != 1)} for them{each}",
                           hint="one worker a GPU" if gpus == 1 else None)  # fmt: skip
    return devices[:wanted]


class LocalWorker:
    """A process, and the pipe to it."""

    def __init__(self, work: Work) -> None:
        context = multiprocessing.get_context("spawn")  # a forked process cannot use a GPU that its parent looked at
        self.pipe, theirs = context.Pipe()
        self.device = work.device
        self.ready = False
        self.job: Any = None
        self.last_words: str | None = None
        self.process = context.Process(target=_work, args=(theirs, work), daemon=False)
        self.process.start()
        theirs.close()

    @property
    def who(self) -> int | None:
        return self.process.pid

    def give(self, name: str, request: Request) -> None:
        with contextlib.suppress(OSError):  # a dead one is noticed by its sentinel
            self.pipe.send((name, request))

    def hear(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """All that it has said since."""
        with contextlib.suppress(EOFError, OSError):
            while self.pipe.poll():
                yield self.pipe.recv()

    def death(self) -> str | None:
        """Why it is dead; None while it lives."""
        return None if self.process.is_alive() else f"exit code {self.process.exitcode}"

    def guilty(self) -> bool:
        """Whether its death may have been its work's fault."""
        return True

    def terminate(self) -> None:
        """Let it keep its state and go; `stop` waits for that."""
        self.process.terminate()

    def stop(self) -> None:
        """Let it go, once it has kept what it holds."""
        with contextlib.suppress(OSError):
            self.pipe.send(None)
        self.process.join(GRACE)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.pipe.close()


class LocalEngine:
    """Starts workers on devices of this machine."""

    def __init__(self, devices: list[str], work: Work) -> None:
        """work: what all are told; device, threads and requests ahead are each worker's own."""
        self.devices, self.work = devices, work

    def start(self, place: int, ahead: Sequence[Request]) -> LocalWorker:
        """The worker at a place, from 0."""
        processes, device = len(self.devices) * self.work.gpus, self.devices[place]
        threads = max(1, (os.cpu_count() or 1) // processes) if processes > 1 else 0
        own = {"device": device} if self.work.gpus == 1 or device == "cpu" else {"device": "cuda", "cards": device}
        return LocalWorker(replace(self.work, threads=threads, ahead=tuple(ahead), **own))  # type: ignore[arg-type]

    def wait(self, workers: Sequence[LocalWorker], seconds: float) -> list[LocalWorker]:
        """Those that have said something, or died; at the latest when so many seconds are over."""
        waitable = {thing: worker for worker in workers for thing in (worker.pipe, worker.process.sentinel)}
        found = [waitable[thing] for thing in connection.wait(list(waitable), seconds)]  # type: ignore[index]
        return list(dict.fromkeys(found))

    def trouble(self) -> str | None:
        """Why no worker begins, where that is known."""
        return None

    def close(self) -> None: ...


def _work(pipe: Any, work: Work) -> None:
    """The process of a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, who then terminates us
    signal.signal(signal.SIGTERM, stop)
    if work.cards is not None:  # before anything looks at them
        os.environ["CUDA_VISIBLE_DEVICES"] = work.cards
    threading.Thread(target=_follow_parent, daemon=True).start()
    try:
        with never_swallowed(), contextlib.suppress(EOFError, BrokenPipeError):  # the parent has gone
            live_together(pipe, work)
    finally:  # who signals a whole group of processes signals us twice, and nothing is left to keep
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent:
        connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)
