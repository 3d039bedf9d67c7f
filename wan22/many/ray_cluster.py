"""The engine `ray`: each worker is an actor of a Ray cluster that holds the model. Where it runs is Ray's decision.

An actor's worker lives in a thread of its own (many/worker.py) between two queues. The parent asks for what it says,
with the number of what it has heard already and of what it has given: so a call can be made again after trouble on the
network, and nothing is lost or done twice. An actor that dies, or is lost with its node, is replaced by a new one,
which Ray starts where there is room.

Every node needs wan22, the weights under the same path, and the output's folder on a file system that all share.
"""

import contextlib
import logging
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import wan22
from wan22.capability import ADA
from wan22.config import Placement, Request, RequestError
from wan22.machine import gpu_capability
from wan22.many.group import live_together
from wan22.many.journal import NAME as JOURNAL
from wan22.many.worker import GRACE, Work
from wan22.options import read_precision

LISTEN = 5.0  # seconds that an actor is waited for to say something
SEEN = 15.0  # seconds until a file of one node is seen on another, over a network
CARD = 30.0  # seconds for a node to say what card it has
NEWS = 60.0  # seconds between two words on why nothing begins


# --- in the actor ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Home:
    """Where the batch was begun: wan22's version there, and the folder that relative paths are relative to."""

    version: str
    folder: Path


class Actor:
    """Holds the model on some node. All methods may be called at the same time, and again."""

    def __init__(self, work: Work, home: Home) -> None:
        import ray

        with contextlib.suppress(OSError):
            os.chdir(home.folder)
        self._orders: queue.SimpleQueue[tuple[str, Request] | None] = queue.SimpleQueue()
        self._given = 0
        self._said: list[Any] = []
        self._heard = 0
        self._news = threading.Condition()
        self._stopped = False
        self.send(("hello", {"node": ray.get_runtime_context().get_node_id(),
                             "who": f"process {os.getpid()} on {socket.gethostname()}"}))  # fmt: skip
        self._thread = threading.Thread(target=self._live, args=(work, home), daemon=True)
        self._thread.start()

    def _live(self, work: Work, home: Home) -> None:
        try:
            if trouble := _elsewhere(work, home):
                self.send(("fatal", trouble))
            else:
                live_together(self, work)
        finally:
            with self._news:
                self._news.notify_all()

    def send(self, said: Any) -> None:
        """For the worker: say it to the parent. Raises SystemExit where the worker is to go: its state is kept then."""
        if self._stopped:
            raise SystemExit(143)
        with self._news:
            self._said.append(said)
            self._news.notify_all()

    def recv(self) -> tuple[str, Request] | None:
        """For the worker: what to make next."""
        return self._orders.get()

    def give(self, order: tuple[int, str, Request] | None) -> None:
        """An item to make, with its number, from 1; the latest may come again."""
        with self._news:
            if order and order[0] > self._given:
                self._given = order[0]
                self._orders.put(order[1:])

    def listen(self, heard: int, order: tuple[int, str, Request] | None) -> list[Any]:
        """All that was said after the first `heard`, waited for a while; the order is the latest, should `give` have
        been lost. With nothing to come any more, the actor ends."""
        import ray

        self.give(order)
        with self._news:
            del self._said[: max(0, heard - self._heard)]
            self._heard = max(heard, self._heard)
            self._news.wait_for(lambda: self._said or not self._thread.is_alive(), LISTEN)
            said = list(self._said)
        if not said and not self._thread.is_alive():
            ray.actor.exit_actor()
        return said

    def leave(self) -> None:
        """Keep the state after the step at work, and end."""
        self._stopped = True
        self._orders.put(None)


def _elsewhere(work: Work, home: Home) -> dict[str, Any] | None:
    """What is wrong with this node, as a `fatal` message."""
    host = socket.gethostname()
    if wan22.__version__ != home.version:
        said = f"{host} has version {wan22.__version__} of wan22, and the batch was begun with {home.version}"
        return {"message": said, "hint": "the same version on every node", "code": 2}
    end = time.monotonic() + SEEN
    while True:
        with contextlib.suppress(OSError):
            if work.run in (work.folder / JOURNAL).read_text(errors="replace"):
                return None
        if time.monotonic() > end:
            return {"message": f"{work.folder} on {host} is not where the batch was begun",
                    "hint": "--output FOLDER on a file system that all nodes share", "code": 2}  # fmt: skip
        time.sleep(0.5)


# --- in the parent ---------------------------------------------------------------------------------------------------
class RayWorker:
    """An actor, as the parent sees it."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self.ready = False
        self.job: Any = None
        self.last_words: str | None = None
        self.who: str | None = None  # not known before Ray has found it a place
        self.node: str | None = None
        self._heard = 0
        self._order: tuple[int, str, Request] | None = None
        self._dead: str | None = None
        self._stopping = False
        self.said = self._ask()

    def _ask(self) -> Any:
        return self.actor.listen.remote(self._heard, self._order)

    def give(self, name: str, request: Request) -> None:
        self._order = (self._order[0] + 1 if self._order else 1, name, request)
        self.actor.give.remote(self._order)

    def hear(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """All that it has said since; nothing where the answer is not here yet."""
        import ray

        if self._dead or not ray.wait([self.said], timeout=0)[0]:
            return
        try:
            said = ray.get(self.said)
        except ray.exceptions.ActorUnavailableError:  # which Ray will find dead, or alive, in a while
            time.sleep(0.5)
            self.said = self._ask()
            return
        except ray.exceptions.RayError as error:
            self._dead = _last_line(error)
            return
        self._heard += len(said)
        self.said = self._ask()
        for kind, data in said:
            if kind == "hello":
                self.who, self.node = data["who"], data["node"]
            else:
                yield kind, data

    def death(self) -> str | None:
        """Why it is dead; None while it lives."""
        return self._dead

    def guilty(self) -> bool:
        """Whether its death may have been its work's fault: not where the whole node is lost."""
        import ray

        return self.node is None or any(node["NodeID"] == self.node and node["Alive"] for node in ray.nodes())

    def terminate(self) -> None:
        """Let it keep its state and go; `stop` waits for that."""
        self._stopping = True
        if self.ready or self.node:
            self.actor.leave.remote()

    def stop(self) -> None:
        """Let it go, once it has kept what it holds where it was to."""
        import ray

        end = time.monotonic() + GRACE
        while self._stopping and self.node and not self._dead and time.monotonic() < end:
            ray.wait([self.said], timeout=1.0)
            for _ in self.hear():
                pass
        ray.kill(self.actor)  # which is no error for a dead one


class RayEngine:
    """Starts workers on a Ray cluster."""

    def __init__(
        self, address: str | None, workers: int | None, gpus: int | None, placement: Placement, work: Work
    ) -> None:
        """address: of a cluster; without one, the one that Ray finds here, or else one that it starts here. workers:
        by default as many as the GPUs of the cluster allow, or one a node. gpus: of each worker; on a CPU, processes.
        work: what all are told; its identity is that of the checkpoint here. Raises RequestError.
        """
        ray = _connect(address)
        if ":" in placement.device:
            raise RequestError(f"--device {placement.device}: with --engine ray, Ray picks the GPU", hint="cuda")
        if workers is not None and workers < 1:
            raise RequestError(f"--workers {workers}: at least one is needed")
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        there = int(sum(node.get("GPU", 0) for node in nodes))
        on_gpu = placement.device == "cuda" or (placement.device == "auto" and (there or gpus))
        self.gpus = (gpus or 1) if on_gpu else 0
        # A cluster that grows may have none yet: then --workers says how many there will be.
        rooms = sum(int(node.get("GPU", 0)) // self.gpus for node in nodes) if on_gpu else len(nodes)
        if not (workers or rooms):
            raise RequestError(f"the Ray cluster has no node with {self.gpus} GPUs",
                               hint="--workers N, where such nodes are to come")  # fmt: skip
        self.devices = [("cuda" if self.gpus > 1 else "cuda:0") if on_gpu else "cpu"] * (workers or rooms)
        cpus = [int(node.get("CPU", 1)) for node in nodes]
        # On a CPU a worker takes its whole share: Ray has torch use as many threads.
        self.cpus = 1 if on_gpu else max(1, min(min(cpus), sum(cpus) // len(self.devices)))
        threads = max(1, self.cpus // work.gpus) if work.gpus > 1 and not on_gpu else 0
        self.work = _definite(ray, replace(work, folder=work.folder.absolute(), device=self.devices[0],
                                           threads=threads))  # fmt: skip
        self._home = Home(wan22.__version__, Path.cwd())
        self._since, self._told = time.monotonic(), 0.0
        self._actor = ray.remote(Actor)

    def start(self, place: int, ahead: Sequence[Request]) -> RayWorker:
        """Another worker, where there is room, now or later."""
        actor = self._actor.options(
            num_gpus=self.gpus, num_cpus=self.cpus, max_restarts=0, max_task_retries=0, max_concurrency=8,
            scheduling_strategy="SPREAD",
        ).remote(replace(self.work, ahead=tuple(ahead)), self._home)  # fmt: skip
        return RayWorker(actor)

    def wait(self, workers: Sequence[RayWorker], seconds: float) -> list[RayWorker]:
        """Those that have said something, or died; at the latest when so many seconds are over."""
        import ray

        by_said = {worker.said: worker for worker in workers}
        ray.wait(list(by_said), num_returns=1, timeout=seconds, fetch_local=False)
        said, _ = ray.wait(list(by_said), num_returns=len(by_said), timeout=0, fetch_local=False)
        if any(worker.ready for worker in workers):
            self._since = time.monotonic()
        return [by_said[one] for one in said]

    def trouble(self) -> str | None:
        """That there is no room for any worker, now and then."""
        now = time.monotonic()
        if now - max(self._since, self._told) < NEWS:
            return None
        self._told = now
        gpus = f"{self.gpus} GPUs and " * bool(self.gpus)
        return f"no worker has begun for {now - self._since:.0f} s; each needs {gpus}{self.cpus} CPUs of one node"

    def close(self) -> None:
        import ray

        ray.shutdown()


def _definite(ray: Any, work: Work) -> Work:
    """The work with its precision as the cluster's cards have it, so that every worker and every name means the same.
    Raises RequestError."""
    on_gpu = work.device != "cpu"
    card = None
    if on_gpu and work.flags["precision"] not in (None, "exact"):
        said = ray.remote(num_gpus=1, num_cpus=0, max_retries=0)(gpu_capability).remote()
        with contextlib.suppress(ray.exceptions.RayError):  # such as no wan22 there, which its worker will tell
            card = ray.get(said, timeout=CARD)
        ray.cancel(said, force=True)
    # The card here, if there is one, has no say; where there is none to ask yet, it is taken for one that can do all.
    precision = read_precision({**work.flags, "device": "cpu"}, work.base, card or ADA if on_gpu else None)
    base = replace(work.base, precision=precision.to_dict())
    return replace(work, flags={**work.flags, "precision": None}, base=base)


def _connect(address: str | None) -> Any:
    """Ray, connected to a cluster. Raises RequestError."""
    try:
        import ray
    except ImportError:
        raise RequestError("--engine ray: Ray is not installed", hint="pip install 'wan22-t2v[ray]'") from None
    if (address or os.environ.get("RAY_ADDRESS", "")).startswith("ray://"):
        raise RequestError("--ray-address ray://…: a client from outside would not see the videos",
                           hint="on a node of the cluster: ray job submit -- wan22 batch …")  # fmt: skip
    host, _, port = (address or os.environ.get("RAY_ADDRESS", "")).rpartition(":")
    if host and port.isdecimal():  # Ray itself tries for minutes
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise RequestError(f"--ray-address {host}:{port}: there is no Ray cluster: {error.strerror or error}",
                               hint="ray start --head prints its address") from None  # fmt: skip
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        # stdout is for data: what the actors print stays in Ray's own logs.
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    except (ConnectionError, ValueError, RuntimeError, OSError, TimeoutError) as error:
        raise RequestError(f"--ray-address {address or 'auto'}: {_last_line(error)}",
                           hint="ray status --address HOST:PORT says whether a cluster is there") from None  # fmt: skip
    finally:
        with contextlib.suppress(ValueError):  # not the main thread
            for number, handler in handlers.items():
                signal.signal(number, handler)  # Ray's own ends with another exit code
    return ray


def _last_line(error: Exception) -> str:
    """Of a message with a traceback inside, what matters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "Error" in line.partition(":")[0]), lines[-1] if lines else repr(error))
