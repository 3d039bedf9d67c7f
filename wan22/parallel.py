"""Several devices on one video: guidance, Ulysses and ring parallel, applied to a transformer from outside.

The model is not changed: the output of `patch_embedding` and the rotary table are cut to a rank's own tokens, `attend`
exchanges tokens for heads and back, the output of `head` is gathered. Every rank ends a step with the same velocity.

Legend: B batch, L all tokens, l a rank's own, N all heads, n a rank's own, D head dim; U, R ranks along the Ulysses and
the ring axis (mesh.py).
"""

import contextlib
import functools
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from wan22.attention import Attend
from wan22.config import Placement, RequestError, RunError
from wan22.model import ContextKV, WanTransformer
from wan22.several.launch import Team, connect, rendezvous
from wan22.several.mesh import Mesh, Shares, shares
from wan22.several.watch import Member, Watchman, count_processor_time, first_time, tick
from wan22.signals import ending_at_once

PATIENCE = timedelta(minutes=30)  # for one message; who does not answer is found out by watch.py, and sooner

# Its newer name, and its older one.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass
class Counts:
    """What a rank had and sent in its last forward passes: tokens and heads of a block, bytes to others."""

    tokens: int = 0
    heads: int = 0
    bytes_sent: int = 0
    passes: int = 0


@dataclass(frozen=True)
class Layout:
    """How one forward pass is spread. Groups are None where they would be of one rank; `order` is this rank's place
    among those that share the tokens, ring × ulysses."""

    ring: int
    ulysses: int
    order: int
    ring_group: dist.ProcessGroup | None
    ulysses_group: dist.ProcessGroup | None
    sequence_group: dist.ProcessGroup | None

    @property
    def sequence(self) -> int:
        return self.ring * self.ulysses

    @property
    def place(self) -> int:
        """Of this rank's Ulysses group, along the ring."""
        return self.order // self.ulysses

    @property
    def seat(self) -> int:
        """Of this rank, in its Ulysses group."""
        return self.order % self.ulysses


@dataclass(eq=False)
class Ranks:
    """This process among those that make a video together."""

    team: Team
    mesh: Mesh
    device: torch.device
    shard_experts: bool = False
    shard_text: bool = False
    counts: Counts = field(default_factory=Counts)
    layout: Layout = field(init=False)

    def __post_init__(self) -> None:
        mesh, ranks = self.mesh, range(self.mesh.world)
        branch, ring, ulysses = mesh.place(self.team.rank)
        self.branch = branch
        self._groups: dict[tuple[int, ...], Any] = {}
        self._pair = self._group([[a, a + mesh.sequence] for a in range(mesh.sequence)] if mesh.guidance == 2 else [])
        by_ring = [[rank for rank in ranks if mesh.place(rank)[::2] == (b, u)]
                   for b in range(mesh.guidance) for u in range(mesh.ulysses)]  # fmt: skip
        by_ulysses = [[rank for rank in ranks if mesh.place(rank)[:2] == (b, r)]
                      for b in range(mesh.guidance) for r in range(mesh.ring)]  # fmt: skip
        by_branch = [[rank for rank in ranks if mesh.place(rank)[0] == b] for b in range(mesh.guidance)]
        ulysses_group = self._group(by_ulysses)
        ring_group, branch_group = self._group(by_ring), self._group(by_branch)
        order = ring * mesh.ulysses + ulysses
        self._guided = Layout(mesh.ring, mesh.ulysses, order, ring_group, ulysses_group, branch_group)
        self._alone = self._guided
        if mesh.guidance == 2:
            # A step without guidance has one branch, and all share its tokens: the branches' axis prolongs the ring.
            along = [[rank for rank in ranks if mesh.place(rank)[2] == u] for u in range(mesh.ulysses)]
            self._alone = Layout(2 * mesh.ring, mesh.ulysses, self.team.rank, self._group(along), ulysses_group,
                                 self._group([list(ranks)]))  # fmt: skip
        self.layout = self._guided
        self._lengths: list[int] = []  # of every rank's tokens, in the sequence at work
        self._plain = dist.new_group(backend="gloo", timeout=PATIENCE)

    def _group(self, lists: Sequence[Sequence[int]]) -> dist.ProcessGroup | None:
        """A process group of each list of ranks; this rank's own. Every rank makes all of them, in the same order, and
        none twice: each takes memory of a GPU."""
        mine = None
        for ranks in map(tuple, lists):
            if len(ranks) > 1:
                if ranks not in self._groups:
                    self._groups[ranks] = dist.new_group(list(ranks), timeout=PATIENCE)
                if self.team.rank in ranks:
                    mine = self._groups[ranks]
        return mine

    @classmethod
    def of(cls, team: Team, mesh: Mesh, placement: Placement) -> Self:
        """This process's part in a mesh, its device as the placement says. Raises RequestError."""
        kind = ("cuda" if torch.cuda.is_available() else "cpu") if placement.device == "auto" else placement.device
        device = torch.device("cuda", torch.cuda.current_device()) if kind == "cuda" else torch.device("cpu")
        if kind == "cpu":
            count_processor_time()
        ranks = cls(team, mesh, device, placement.dit_fsdp, placement.t5_fsdp)
        if kind == "cuda":
            cards = ranks.gather((platform.node(), str(torch.cuda.get_device_properties(device).uuid)))
            if len(set(cards)) < len(cards):
                raise RequestError(f"{team.local_world} processes on a machine with {len(set(cards))} GPUs",
                                   hint="as many processes as GPUs, or --device cpu")  # fmt: skip
        return ranks

    @property
    def first(self) -> bool:
        """Whether this is the rank that speaks, writes and keeps the state."""
        return self.team.rank == 0

    @property
    def on_this_device(self) -> int:
        """Ranks that share its memory: one on a GPU, all of a machine on its CPU."""
        return self.team.local_world if self.device.type == "cpu" else 1

    def describe(self) -> str:
        """"4 GPUs: guidance × 2, ulysses × 2"."""
        parts = (("experts", self.shard_experts), ("text encoder", self.shard_text))
        sharded = [what for what, asked in parts if asked]
        kind = "GPUs" if self.device.type == "cuda" else "processes"
        return f"{self.mesh.world} {kind}: {self.mesh}" + (f"; {' and '.join(sharded)} sharded" if sharded else "")

    # --- the transformer -----------------------------------------------------------------------------------------
    def split(self, model: WanTransformer) -> None:
        """Have a model, whose attention backend is chosen, work on this rank's tokens and heads."""
        model.patch_embedding.register_forward_hook(lambda module, args, tokens: self._own(tokens, 1))
        model.rotary.register_forward_hook(lambda module, args, table: tuple(self._own(part, 0) for part in table))
        model.head.register_forward_hook(lambda module, args, patches: self._gather(patches))
        block: Any
        for block in model.blocks:
            block.self_attn.attend = functools.partial(self.attend, block.self_attn.attend)

    def evaluate(
        self, model: WanTransformer, latents: Tensor, timestep: Tensor, context: ContextKV, negative: ContextKV | None
    ) -> tuple[Tensor, Tensor | None]:
        """Both branches, each on its own half of the ranks: as `sampling.evaluate`, and the same on every rank."""
        with contextlib.nullcontext() if self.counts.passes else first_time():
            return self._evaluate(model, latents, timestep, context, negative)

    def _evaluate(
        self, model: WanTransformer, latents: Tensor, timestep: Tensor, context: ContextKV, negative: ContextKV | None
    ) -> tuple[Tensor, Tensor | None]:
        self.layout = self._alone if negative is None else self._guided
        if negative is None:
            return model(latents, timestep, context), None
        if self._pair is None:
            return model(latents, timestep, context), model(latents, timestep, negative)
        own = model(latents, timestep, (context, negative)[self.branch]).contiguous()
        both = own.new_empty(2, *own.shape)
        tick()
        all_gather(both.flatten(0, 1), own, self._pair)
        self.counts.bytes_sent += own.nbytes
        return both[0], both[1]

    def agree(self, sums: list[float]) -> list[float]:
        """Of a `StepCache`: sums over a rank's tokens → those over all tokens of the first branch, on every rank."""
        counts = self.layout is not self._guided or self.branch == 0
        totals = torch.tensor(sums, dtype=torch.float64) * counts
        tick()
        dist.all_reduce(totals, group=self._plain)
        return totals.tolist()

    def _own(self, x: Tensor, dim: int) -> Tensor:
        """The part of a whole sequence that is this rank's."""
        if self.layout.sequence == 1:
            return x
        self._lengths = shares(x.shape[dim], self.layout.sequence)
        order = self.layout.order
        # A copy, or the whole would stay as long as its part.
        return x.narrow(dim, sum(self._lengths[:order]), self._lengths[order]).clone()

    def _gather(self, own: Tensor) -> Tensor:
        """A rank's patches [B, l, C] → all [B, L, C]."""
        self.counts.tokens, self.counts.passes = own.shape[1], self.counts.passes + 1
        group = self.layout.sequence_group
        return own if group is None else torch.cat(self._all_of(own, self._lengths, group), dim=1)

    def _all_of(self, own: Tensor, lengths: Sequence[int], group: dist.ProcessGroup) -> list[Tensor]:
        """A rank's [B, l, …] → those of all ranks of a group, in order; a message has the longest one's length."""
        tick()
        padded = own.new_zeros(len(own), max(lengths), *own.shape[2:])
        padded[:, : own.shape[1]] = own
        room = own.new_empty(len(lengths) * len(own), *padded.shape[1:])
        all_gather(room, padded, group)
        self.counts.bytes_sent += (len(lengths) - 1) * padded.nbytes
        return [part[:, :length] for part, length in zip(room.chunk(len(lengths)), lengths, strict=True)]

    # --- its attention -------------------------------------------------------------------------------------------
    def attend(self, backend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v [B, l, N, D] of a rank's tokens → the same of what is attended among all tokens.

        Ulysses: l tokens of all heads become all tokens (of one place of the ring) of n heads, and back. Ring: the keys
        and values of the other places are gathered, so that any backend serves and none need tell its log-sum-exps;
        the bytes sent are those of the ring's own scheme. Messages and attention take turns: beside one another they
        were as slow, or slower (docs/parallel.md).
        """
        tick()
        layout = self.layout
        if layout.sequence == 1:
            self.counts.heads = q.shape[2]
            return backend(q, k, v)
        lengths = self._lengths_at(layout.place)
        widths = shares(q.shape[2], layout.ulysses)  # heads of each rank of the Ulysses group
        self.counts.heads = widths[layout.seat]
        if layout.ulysses_group is not None:
            q, k, v = self._to_heads(q, k, v, widths, lengths)
        if layout.ring_group is not None:
            k, v = self._along_ring(k, v)
        attended = backend(q, k, v)
        return attended if layout.ulysses_group is None else self._to_tokens(attended, widths, lengths)

    def _lengths_at(self, place: int) -> list[int]:
        """Tokens of each rank of the Ulysses group at a place of the ring."""
        ranks = self.layout.ulysses
        return self._lengths[place * ranks : (place + 1) * ranks]

    def _to_heads(
        self, q: Tensor, k: Tensor, v: Tensor, widths: list[int], lengths: list[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Send every rank the queries, keys and values of its heads in one message, and have one's own from all.

        A token's three lie side by side, so that what comes from all ranks is attended to where it lies, uncopied."""
        (batch, length, _, depth), width = q.shape, widths[self.layout.seat]
        sizes = [3 * batch * length * other * depth for other in widths]
        send = q.new_empty(sum(sizes))
        heads = zip(*(x.split(widths, dim=2) for x in (q, k, v)), strict=True)
        for piece, other, three in zip(send.split(sizes), widths, heads, strict=True):
            for target, x in zip(piece.view(batch, length, 3, other, depth).unbind(2), three, strict=True):
                target.copy_(x)
        shapes = [(batch, other, 3, width, depth) for other in lengths]
        back = [math.prod(shape) for shape in shapes]
        received = self._exchange(send, sizes, back)
        if batch == 1:  # one rank's tokens behind the other's
            q, k, v = received.view(1, -1, 3, width, depth).unbind(2)
        else:
            pieces = [piece.view(shape) for piece, shape in zip(received.split(back), shapes, strict=True)]
            q, k, v = torch.cat(pieces, dim=1).unbind(2)
        return q, k, v

    def _along_ring(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a ring's place → those of all places, in order."""
        layout = self.layout
        lengths = [sum(self._lengths_at(place)) for place in range(layout.ring)]
        own = k.new_zeros(2, len(k), max(lengths), *k.shape[2:])
        own[0, :, : k.shape[1]], own[1, :, : v.shape[1]] = k, v
        room = own.new_empty(layout.ring * 2, *own.shape[1:])
        all_gather(room, own, layout.ring_group)
        self.counts.bytes_sent += (layout.ring - 1) * own.nbytes
        places = zip(room.view(layout.ring, *own.shape), lengths, strict=True)
        k, v = torch.cat([place[:, :, :length] for place, length in places], dim=2).unbind(0)
        return k, v

    def _to_tokens(self, attended: Tensor, widths: list[int], lengths: list[int]) -> Tensor:
        """Send every rank its tokens' results of one's own heads → one's own tokens' results of all heads."""
        batch, _, width, depth = attended.shape
        own = lengths[self.layout.seat]
        if batch == 1:
            send = attended.reshape(-1)  # uncopied, where the backend's result has no gaps
        else:
            send = torch.cat([piece.flatten() for piece in attended.split(lengths, dim=1)])
        shapes = [(batch, own, other, depth) for other in widths]
        sizes = [batch * length * width * depth for length in lengths]
        back = [math.prod(shape) for shape in shapes]
        received = self._exchange(send, sizes, back)
        return torch.cat([piece.view(shape) for piece, shape in zip(received.split(back), shapes, strict=True)], dim=2)

    def _exchange(self, send: Tensor, sizes: list[int], back: list[int]) -> Tensor:
        """Numbers for each rank of the Ulysses group → those of each."""
        received = send.new_empty(sum(back))
        dist.all_to_all_single(received, send, back, sizes, self.layout.ulysses_group)
        kept = sizes[self.layout.seat]
        self.counts.bytes_sent += (send.numel() - kept) * send.element_size()
        return received

    # --- plain values --------------------------------------------------------------------------------------------
    def share(self, value: Any) -> Any:
        """The first rank's value, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._plain)
        return box[0]

    def part(self) -> None:
        """The end, once all ranks have come to it."""
        dist.barrier(self._plain)
        dist.destroy_process_group()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in order, on every rank."""
        values: list[Any] = [None] * self.mesh.world
        dist.all_gather_object(values, value, self._plain)
        return values

    def shares(self) -> Shares:
        """What of a run's memory is this rank's, for planning."""
        experts, text = (self.mesh.world if sharded else 1 for sharded in (self.shard_experts, self.shard_text))
        return Shares(self.mesh.world, self.mesh.sequence, experts, text, self.team.local_world)


# --- coming together -------------------------------------------------------------------------------------------------
def meet(team: Team) -> Member:
    """Join the process group, and the watch over it: from here on whoever fails ends all. Raises RunError."""
    os.environ.update(rendezvous(os.environ, team))
    member = connect(os.environ, team)
    on_gpu = torch.cuda.is_available()
    if on_gpu:  # SLURM may show each process its own card alone
        torch.cuda.set_device(team.local_rank % torch.cuda.device_count())
    try:
        with ending_at_once(tell=member is None and team.rank == 0):
            dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=PATIENCE)
    except (dist.DistError, RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RunError(f"rank {team.rank} of {team.world} did not find the others at {where}: "
                       f"{str(error).splitlines()[0]}") from None  # fmt: skip
    if member is None:
        box: list[Any] = [None]
        if team.rank == 0:
            watchman = Watchman(team.world)
            box = [(os.environ["MASTER_ADDR"], watchman.port, watchman.token)]
        with ending_at_once(tell=team.rank == 0):
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        host, port, token = box[0]
        member = Member(team.rank, (host if team.rank else "127.0.0.1", port), token)
    return member

