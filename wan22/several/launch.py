"""Who this process is among others, however they were started; and starting them. Standard library only.

torchrun and SLURM (`srun`) each tell a process its number through the environment; `--gpus N` starts N processes of the
same command line itself, and tells them as torchrun would.
"""

import contextlib
import os
import secrets
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL, Popen, TimeoutExpired
from types import FrameType
from typing import IO, Any

from wan22.config import EIGHT_BIT, Placement, Precision, RequestError
from wan22.several.mesh import first_host
from wan22.several.watch import RESCUE, Member, News, Watchman, announce
from wan22.signals import STOPPED

HERE = str(Path(__file__).resolve().parent.parent)  # where this package is, installed or not
WATCH = "WAN22_WATCH"  # address and token of the watchman, for processes that `--gpus` started


@dataclass(frozen=True)
class Team:
    """A process's number among `world`, and among the `local_world` of its machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1


def team_of(environment: Mapping[str, str]) -> Team:
    """Who this process is by its environment: torchrun's variables, then those of SLURM's `srun`. Raises RequestError
    where they make no sense."""
    for names in (
        ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    ):
        if names[1] not in environment or names[0] not in environment:
            continue
        try:
            rank, world = int(environment[names[0]]), int(environment[names[1]])
            local_rank = int(environment.get(names[2], rank))
            # SLURM writes 4(x2),3 for two nodes of four and one of three; the largest is what a mesh is made for.
            told = environment.get(names[3], str(world)).replace(",", " ").split()
            local_world = max(int(part.partition("(")[0]) for part in told)
        except ValueError:
            said = ", ".join(f"{name}={environment.get(name)}" for name in names)
            raise RequestError(f"the environment says {said}, which are not numbers") from None
        if not (0 <= rank < world and 0 <= local_rank < local_world <= world):
            raise RequestError(f"the environment says {names[0]}={rank}, {names[1]}={world}, {names[2]}={local_rank}, "
                               f"{names[3]}={local_world}, which cannot be")  # fmt: skip
        return Team(rank, world, local_rank, local_world)
    return Team()


def follows(environment: Mapping[str, str]) -> bool:
    """Whether another process is the first of this one's team, and speaks for all."""
    try:
        return team_of(environment).rank > 0
    except RequestError:  # nobody is known to
        return False


def refuse_lonely(
    placement: Placement, precision: Precision, team: Team,
    hint: str = "--gpus N, or torchrun --nproc_per_node=N generate.py …",
) -> None:  # fmt: skip
    """What several processes are asked for and one cannot do, and what several cannot. hint: how there are several.
    Raises RequestError."""
    world = placement.gpus or team.world
    if team.world > 1 and world != team.world:
        raise RequestError(f"--gpus {world}: this is one of {team.world} processes that were started already",
                           hint="--gpus without torchrun or srun, or these without it")  # fmt: skip
    for flag, asked in (("--dit_fsdp", placement.dit_fsdp), ("--t5_fsdp", placement.t5_fsdp),
                        ("--ulysses_size", (placement.ulysses_size or 1) > 1),
                        ("--ring_size", (placement.ring_size or 1) > 1)):  # fmt: skip
        if asked and world == 1:
            raise RequestError(f"{flag} needs several processes", hint=hint)
    if world == 1:
        return
    if placement.offload in ("block", "disk"):
        raise RequestError(f"--offload {placement.offload}: for one GPU alone; there are {world}",
                           hint="--dit_fsdp, which keeps a part of each expert on each of them")  # fmt: skip
    if ":" in placement.device:
        raise RequestError(f"--device {placement.device}: there are {world} processes, each with its own GPU",
                           hint="choose cards: CUDA_VISIBLE_DEVICES=0,1")  # fmt: skip
    if placement.dit_fsdp:
        refuse_sharded(precision)


def refuse_sharded(precision: Precision) -> None:
    """Weights of which no rank can keep a part. Raises RequestError."""
    if precision.weights in EIGHT_BIT:  # PyTorch's sharding would have to be taught their scales
        raise RequestError(f"--dit_fsdp goes with no {precision.weights} weights",
                           hint="--dtype bf16, or whole experts: without --dit_fsdp")  # fmt: skip


def refuse_torchrun(environment: Mapping[str, str], said: str, hint: str) -> None:
    """What each of the processes that torchrun or srun starts would do alone, and the same. Raises RequestError."""
    if team_of(environment).world > 1:
        raise RequestError(said, hint=hint)


def rendezvous(environment: Mapping[str, str], team: Team) -> dict[str, str]:
    """What torch.distributed wants to find in the environment: torchrun sets it, for SLURM it is derived. Raises
    RequestError."""
    told = {name: environment[name] for name in ("MASTER_ADDR", "MASTER_PORT") if name in environment}
    if "MASTER_ADDR" not in told:
        nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "127.0.0.1")
        told["MASTER_ADDR"] = first_host(nodes)
    if "MASTER_PORT" not in told:
        try:
            job, step = (int(environment.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
        except ValueError:
            said = "the environment says no MASTER_PORT, and SLURM_JOB_ID or SLURM_STEP_ID is no number to make it of"
            raise RequestError(said, hint="set MASTER_PORT, the same for all") from None
        told["MASTER_PORT"] = str(20000 + (job * 16 + step % 16) % 40000)
    port = told["MASTER_PORT"]
    if not (port.isdecimal() and 0 < int(port) < 65536):
        raise RequestError(f"the environment says MASTER_PORT={port}, which is no port", hint="1 to 65535")
    return {**told, "RANK": str(team.rank), "WORLD_SIZE": str(team.world), "LOCAL_RANK": str(team.local_rank)}


def connect(environment: Mapping[str, str], team: Team) -> Member | None:
    """The thread that ends this process with the others, where `--gpus` started it."""
    if WATCH not in environment:
        return None
    try:
        host, port, token = environment[WATCH].split(" ")
        return Member(team.rank, (host, int(port)), token)
    except (OSError, ValueError):
        said = f"the environment says {WATCH}={environment[WATCH]}: nobody listens there"
        raise RequestError(said, hint=f"unset {WATCH}: --gpus sets it, for what it starts") from None


def _free_port() -> int:
    """A port that nobody has now, nor is given in the seconds till the first process listens there: by chance, out of
    those that systems give to nobody who does not ask for them (Linux begins at 32768, gVisor at 16000)."""
    for _ in range(100):
        port = 10_000 + secrets.randbelow(6000)
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            return port
    with socket.create_server(("", 0)) as free:
        return int(free.getsockname()[1])


def place_to_meet(watchman: Watchman) -> dict[str, str]:
    """What processes of this machine are to find in the environment, to find each other and their watchman."""
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()),
            WATCH: f"127.0.0.1 {watchman.port} {watchman.token}"}  # fmt: skip


def launch(argv: Sequence[str], count: int) -> int:
    """`wan22 ARGV` in `count` processes on this machine; the exit code. The first one's output is this one's; of the
    others, only what ends the run is told, once."""
    asked: list[int] = []  # signals that came to this process

    def told_to(news: News) -> News:
        """After a signal, however a process ends of it is what was asked for."""
        ended = asked and news.kind in ("stopped", "died", "lost", "cut off")
        return News("stopped", news.rank, STOPPED[128 + asked[0]], (), 128 + asked[0]) if ended else news

    watchman = Watchman(count, "127.0.0.1", lambda news: announce(told_to(news)))
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // count))
    path = os.pathsep.join(filter(None, (HERE, os.environ.get("PYTHONPATH"))))
    shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), **place_to_meet(watchman),
              "OMP_NUM_THREADS": threads, "PYTHONPATH": path}  # fmt: skip
    with contextlib.ExitStack() as stack:
        said = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(count)]
        children: list[Popen[bytes]] = []
        stack.callback(_kill, children)
        stack.enter_context(_forwarding(children, asked))
        for rank in range(count):
            quiet: dict[str, Any] = {} if rank == 0 else {"stdout": DEVNULL, "stderr": said[rank]}
            environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            # A session of their own: Ctrl-C comes to this process alone, which passes it on.
            children.append(Popen([sys.executable, "-m", "wan22", *argv], env=environment, stdin=DEVNULL,
                                  start_new_session=True, **quiet))  # fmt: skip
        if asked:  # while not all of them were there
            _terminate(children)
        told: set[int] = set()
        while not watchman.ended.wait(0.1):
            codes = [child.poll() for child in children]
            for rank, code in enumerate(codes):
                if code and rank not in told:
                    told.add(rank)
                    watchman.hear(_death(rank, code, said[rank]))
            if all(code == 0 for code in codes):
                return 0
        assert watchman.verdict
        # The first one keeps the run's state, which takes a moment.
        _await(children, RESCUE + 2)
        _kill(children)
        return told_to(watchman.verdict).code


def _death(rank: int, code: int, said: IO[bytes]) -> News:
    said.seek(0)
    lines = [line.strip() for line in said.read()[-4000:].decode(errors="replace").splitlines() if line.strip()]
    hints = () if code in (-signal.SIGKILL, -signal.SIGTERM) else tuple(lines[-1:])
    return News("died", rank, f"rank {rank} {how_ended(code)}", hints, 1 if code < 0 else code)


def how_ended(code: int) -> str:
    """Of a process, by its exit code, which is less than 0 for a signal."""
    return f"was killed by {_signal_name(-code)}" if code < 0 else f"ended with exit code {code}"


def _signal_name(number: int) -> str:
    """`SIGKILL`, or `signal 77` where there is no such name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


@contextlib.contextmanager
def _forwarding(children: "list[Popen[bytes]]", asked: list[int]) -> Any:
    def forward(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        _terminate(children)

    before: dict[int, Callable[..., Any] | int | None] = {
        number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _terminate(children: "list[Popen[bytes]]") -> None:
    """By the signal that also a Python that is only just starting takes without a word."""
    for child in children:
        with contextlib.suppress(OSError):
            child.terminate()


def _await(children: "Sequence[Popen[bytes]]", seconds: float) -> None:
    end = time.monotonic() + seconds
    for child in children:
        with contextlib.suppress(TimeoutExpired):
            child.wait(max(0.0, end - time.monotonic()))


def _kill(children: "Sequence[Popen[bytes]]") -> None:
    for child in children:
        if child.poll() is None:
            child.kill()
        child.wait()
