"""How a video is spread over several processes, by arithmetic alone: guidance × ring × Ulysses. Standard library only.

Legend: a rank is a process with a device of its own, numbered from 0; L video tokens, N heads.

| axis     | what its ranks divide                       | what they send each other                             |
|----------|---------------------------------------------|-------------------------------------------------------|
| guidance | the two branches                            | a velocity a step                                     |
| ulysses  | the tokens; in attention, the heads instead | q, k, v and what is attended, in every block          |
| ring     | the tokens; in attention, the queries       | keys and values of a rank's own heads, in every block |

Source of Ulysses: Jacobs et al., "DeepSpeed Ulysses" (2023). Of the ring: Liu et al., "Ring Attention with Blockwise
Transformers for Near-Infinite Context" (2023).
"""

import re
from dataclasses import dataclass

from wan22.config import RequestError


@dataclass(frozen=True)
class Mesh:
    """Ranks along each axis. Neighbours in number are of one Ulysses group first, which sends most, and the two
    branches of guidance are furthest apart: where there are several nodes, each axis gets the links that it needs."""

    guidance: int = 1
    ring: int = 1
    ulysses: int = 1

    @property
    def sequence(self) -> int:
        """Ranks that share the tokens of one branch."""
        return self.ring * self.ulysses

    @property
    def world(self) -> int:
        return self.guidance * self.sequence

    def place(self, rank: int) -> tuple[int, int, int]:
        """A rank's place on the axes guidance, ring, ulysses."""
        return rank // self.sequence, rank % self.sequence // self.ulysses, rank % self.ulysses

    def __str__(self) -> str:
        parts = [f"guidance × {self.guidance}"] if self.guidance > 1 else []
        parts += [f"ulysses × {self.ulysses}"] if self.ulysses > 1 else []
        parts += [f"ring × {self.ring}"] if self.ring > 1 else []
        return ", ".join(parts) or "one"


@dataclass(frozen=True)
class Shares:
    """What of a run's memory one rank of `world` has: one part of the tokens in `sequence`, of an expert's weights in
    `shards`, of the text encoder's in `text_shards`; `processes` of them share a host's memory."""

    world: int = 1
    sequence: int = 1
    shards: int = 1
    text_shards: int = 1
    processes: int = 1


def shares(total: int, parts: int) -> list[int]:
    """`total` tokens or heads on `parts` ranks, as even as can be, the larger shares first."""
    return [total // parts + (part < total % parts) for part in range(parts)]


def choose_mesh(
    world: int, local_world: int, heads: int, tokens: int, guided: bool,
    ulysses: int | None = None, ring: int | None = None,
) -> Mesh:  # fmt: skip
    """The mesh of `world` ranks, `local_world` on each node.

    Guidance first, since it sends least: where the run is guided and the ranks are even in number. Then Ulysses within
    a node, as far as there are heads, and the ring for the rest. What is asked for by `ulysses` and `ring` stands.
    Raises RequestError for what cannot work.
    """
    for flag, asked in (("--ulysses_size", ulysses), ("--ring_size", ring)):
        if asked is not None and world % asked:
            raise RequestError(f"{flag} {asked}: does not divide {_processes(world)}",
                               hint=f"say one of {', '.join(map(str, _divisors(world)))}")  # fmt: skip
    asked = (ulysses or 1) * (ring or 1)
    if world % asked:
        raise RequestError(f"--ulysses_size {ulysses} × --ring_size {ring}: does not divide {_processes(world)}")
    left = world // asked
    if ulysses and ring and left > 2:
        raise RequestError(f"--ulysses_size {ulysses} × --ring_size {ring}: leaves {left} of {_processes(world)} over, "
                           "and guidance has two branches")  # fmt: skip
    if ulysses and ring and left == 2 and not guided:
        raise RequestError(f"--ulysses_size {ulysses} × --ring_size {ring}: half of {_processes(world)} would idle: "
                           "without guidance there is one branch")  # fmt: skip
    guidance = 2 if guided and left % 2 == 0 else 1
    sequence = world // guidance
    if ulysses is None and ring is None:
        near = min(sequence, local_world)
        ulysses = max(n for n in _divisors(sequence) if n <= min(near, heads))
    ulysses = ulysses or sequence // (ring or 1)
    mesh = Mesh(guidance, sequence // ulysses, ulysses)
    if mesh.ulysses > heads:
        raise RequestError(f"--ulysses_size {mesh.ulysses}: the model has {heads} heads, and each rank needs one",
                           hint=f"at most --ulysses_size {heads}; --ring_size for the rest")  # fmt: skip
    if world > tokens:
        raise RequestError(f"{_processes(world)}: the video has {tokens} tokens, and each rank needs one",
                           hint="fewer processes, or a larger --size")  # fmt: skip
    return mesh


def _processes(world: int) -> str:
    return f"{world} processes"


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def first_host(nodes: str) -> str:
    """The first name of a SLURM list of nodes: `gpu[03-05,9],login1` → `gpu03`. Source: sbatch(1), SLURM_JOB_NODELIST.
    """
    match = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\])?([^\[,]*)", nodes)
    return "".join(part or "" for part in match.groups()) if match else nodes
