"""Several GPUs a worker: the worker is the first of a few processes that make each video together, on one machine.

The first one has the pipe to the batch. It starts the others and hands them what it is given; all of them run the same
worker, and the others say nothing. They end together (several/watch.py): the watchman is in the first one, so that its
death is theirs, and one of theirs ends it, with the state kept. Then the batch replaces the worker, as any that died.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from typing import Any

from wan22.config import one_line
from wan22.many.worker import Pipe, Work, live
from wan22.several.launch import how_ended, place_to_meet
from wan22.several.watch import RESCUE, Member, News, Watchman, of_another

LAST_WORDS = 0.2  # seconds for what killed one of them to reach the batch, before all end
FAREWELL = 20.0  # seconds for the others to go, once all is made


class _First:
    """The first one's pipe: what comes is passed on to the others."""

    def __init__(self, pipe: Pipe, others: list[Any]) -> None:
        self._pipe, self._others, self._one_at_a_time = pipe, others, threading.Lock()

    def send(self, said: Any) -> None:
        with self._one_at_a_time:
            self._pipe.send(said)

    def recv(self) -> Any:
        given = self._pipe.recv()
        for other in self._others:
            with contextlib.suppress(OSError):  # of one that is dead: the watchman sees to that
                other.send(given)
        return given


class _Other:
    """Another one's: it hears, and has nothing to say."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe

    def send(self, said: Any) -> None: ...

    def recv(self) -> Any:
        return self._pipe.recv()


def live_together(pipe: Pipe, work: Work) -> None:
    """A worker's life, in as many processes as it has GPUs; this is the first of them."""
    if work.gpus == 1:
        return live(pipe, work)

    def tell(news: News) -> None:
        # Whoever was not there yet when all were told to end is not told any more.
        end = threading.Timer(LAST_WORDS + RESCUE + 1, os._exit, [1])
        end.daemon = True
        end.start()
        with contextlib.suppress(OSError, SystemExit):
            first.send(("dying", {"why": news.line}))
        time.sleep(LAST_WORDS)
        for other in others:  # they keep nothing; and one that is stopped hears nothing
            other.kill()

    others: list[Any] = []
    context = multiprocessing.get_context("spawn")  # a forked process cannot use a GPU that this one looked at
    pipes = [context.Pipe() for _ in range(work.gpus - 1)]
    first = _First(pipe, [ours for ours, _ in pipes])
    watchman = Watchman(work.gpus, "127.0.0.1", tell)
    place = place_to_meet(watchman)
    for rank, (_, theirs) in enumerate(pipes, 1):
        other = context.Process(target=_live_beside, args=(theirs, replace(work, rank=rank), place), daemon=True)
        other.start()
        theirs.close()
        others.append(other)
        threading.Thread(target=_wait, args=(rank, other, watchman), daemon=True).start()
    member = None
    try:
        member = _meet(work, place)
        live(first, work, member)
        for other in others:
            other.join(FAREWELL)
    except Exception as error:
        if member is None:  # which may pass, so that it is no error of the batch: another worker begins
            first.send(("dying", {"why": str(error)}))
            raise SystemExit(1) from error
        if of_another(error):  # all end, and the watchman knows why
            os._exit(member.fail(News("cut off", 0, one_line(str(error)))))
        raise
    finally:
        if member:
            member.leave()
        watchman.close()
        for other in others:
            other.kill()


def _wait(rank: int, other: Any, watchman: Watchman) -> None:
    """How another one ended, for the watchman, which sees only that it did."""
    other.join()
    if code := other.exitcode:
        watchman.hear(News("died", rank, f"rank {rank} {how_ended(code)}"))


def _meet(work: Work, place: dict[str, str]) -> Member:
    """This process among the others. Raises RunError, where a port was taken since."""
    from wan22.parallel import meet

    os.environ.update(place)
    return meet(work.team)


def _live_beside(pipe: Any, work: Work, place: dict[str, str]) -> None:
    """The process of another one. It goes with the first, whoever signals it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (till the end): what is to be said, the first one says
    member = None
    try:
        member = _meet(work, place)
        live(_Other(pipe), work, member)
        member.leave()
    except BaseException as error:  # the first one is stuck in a message to this one: all end
        cause = error.__cause__ or error
        line = one_line(f"rank {work.rank}: {cause if str(cause) else type(cause).__name__}")
        kind = "cut off" if of_another(cause) else "failed"
        os._exit(member.fail(News(kind, work.rank, line)) if member else 1)
