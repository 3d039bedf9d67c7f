"""What a run needs, in bytes, from shapes alone, before anything is loaded and without torch; and what to do with it.

The arithmetic is sizes.py's and vae_sizes.py's; here are the placements side by side, and the choice.
"""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from wan22.config import (
    GPU_RESERVE,
    DoesNotFit,
    Placement,
    Precision,
    Request,
    RequestError,
    Residency,
    parse_bytes,
)
from wan22.machine import Room, gpu_memory, host_memory
from wan22.measuring.rates import Time
from wan22.measuring.rates import choose as choose_rates
from wan22.output.names import STATE
from wan22.several.launch import Team
from wan22.several.mesh import Mesh, Shares, choose_mesh
from wan22.sizes import (
    ITEM,
    SOLVER_COPIES,
    WORKSPACE,
    Sizes,
    Terms,
    block_moments,
    cache_terms,
    host_terms,
    lasting_terms,
    reading_terms,
    rotary_bytes,
    text_terms,
    tokens_of,
    total,
    weight_terms,
)
from wan22.vae_sizes import Grid, decode_terms, finer, rank_grid

HOST_BASE = {"cpu": 1 << 30, "cuda": 2 << 30}  # Python with its libraries, and the driver's part: 1.8 to 1.95 GiB seen
COMMUNICATORS = 1 << 30  # NCCL's, one for each axis that messages go along; to be measured
SMALLER = ((1280, 720, 49), (832, 480, 81), (832, 480, 33), (480, 272, 33), (256, 256, 17))  # to be proposed


# --- the choice ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Option:
    """One placement: what it needs, and whether that is there. Phases' figures are peaks of the device's memory; on a
    CPU they are part of the host's.

    beside: what is on the device besides, in some phases, as there is room for it: an expert that comes early, and
    experts that stay for the next video.
    """

    residency: Residency
    text_encoder: str
    tiles: Grid
    phases: dict[str, Terms]
    beside: dict[str, Terms]
    host: Terms
    lacks: str  # what there is too little of, in words; empty where it fits

    def peak(self, phase: str) -> int:
        """What a phase needs."""
        return total(self.phases[phase])

    def taken(self, phase: str) -> int:
        """And with what is beside it."""
        return self.peak(phase) + total(self.beside.get(phase, {}))

    @property
    def gpu_bytes(self) -> int:
        return max(map(self.peak, self.phases))

    @property
    def host_bytes(self) -> int:
        return total(self.host)


@dataclass(frozen=True)
class Plan:
    """All placements side by side, from most memory to least; `chosen` is None where none fits.

    ladder: the chosen residency and what follows where memory runs out after all: those that need less of the
    device's and fit the host, with no block resident too.
    """

    options: list[Option]
    chosen: Option | None
    ladder: list[Residency]
    disk_bytes: int
    gpu: Room | None
    gpu_limit: int | None
    host: Room

    @property
    def gpu_free(self) -> int:
        """Bytes of GPU memory to make do with."""
        return min(self.gpu.free, self.gpu_limit or self.gpu.free) if self.gpu else 0


def make_plan(
    request: Request, precision: Precision, placement: Placement, sizes: Sizes, gpu: Room | None, host: Room,
    fused: bool | None = None, shares: Shares = Shares(),  # noqa: B008 (frozen)
) -> Plan:  # fmt: skip
    """gpu: its room, None for a run on the CPU; fused: whether the Triton kernels run, which they do on a GPU; shares:
    of one rank, where there are several. Never raises for what does not fit: the plan says so."""
    device = "cuda" if gpu else "cpu"
    precision = precision.resolve(device)
    item, sizes = ITEM[precision.weights], sizes.at(precision)
    fused = device == "cuda" if fused is None else fused
    tokens = -(-tokens_of(request) // shares.sequence)
    moments = block_moments(tokens, sizes, item, fused, precision.attention.startswith("int8"))
    if shares.sequence > 1:
        # q, k and v to others, from others, put together; what is attended to others and from them.
        moments["attention"]["exchanged"] = 8 * moments["attention"]["h"]
        residual = moments["norm"]["residual"]
        moments["embedding"] = {"all tokens": 4 * tokens_of(request) * sizes.dim, "residual": residual}
    moment = max(moments, key=lambda name: total(moments[name]))
    lasting = lasting_terms(request, sizes, item) | cache_terms(
        request, sizes, precision, shares.sequence, shares.world // shares.sequence
    )
    activations = lasting | {f"{moment}: {name}": n for name, n in moments[moment].items()}
    libraries = {"workspace of products": WORKSPACE} if gpu else {}
    activations |= libraries
    if shares.world > 1 and gpu:
        activations["communicators"] = COMMUNICATORS
    budget = None
    if gpu:
        budget = min(gpu.free, placement.gpu_memory_limit or gpu.free) - GPU_RESERVE
    free = None if budget is None else budget - total(libraries)
    text = "cpu" if placement.text_encoder == "cpu" else _text_mode(sizes, item, free, shares.text_shards)
    vae = ITEM[precision.vae]
    room = (host.free - shares.processes * HOST_BASE[device]) // shares.processes if free is None else free
    tiles = pick_tiles(request.latent_shape, sizes, room, vae, shares.world)
    phases = {
        "text": text_terms("device" if device == "cpu" else text, sizes, item, shares.text_shards) | libraries,
        "decode": decode_terms(request.latent_shape, sizes.vae_width, tiles, vae) | libraries,
    }
    text_on_host = {} if text == "device" or device == "cpu" else {"text encoder": sizes.text_encoder * item}
    options = []
    for residency in _residencies(sizes, item, device, budget, total(activations), host, shares):
        weights = weight_terms(residency, sizes, item, shares.shards)
        if residency.kind == "none":
            weights["other rotary table"] = rotary_bytes(request)
        all_phases = {"text": phases["text"], "denoise": weights | activations, "decode": phases["decode"]}
        # The phases follow one another.
        pinned = host_terms(residency, sizes, item)
        base = {"base": shares.processes * HOST_BASE[device]}
        on_host = base | (pinned if total(pinned) > total(text_on_host) else text_on_host)
        if device == "cpu":
            most = max(all_phases, key=lambda phase: total(all_phases[phase]))
            on_host |= {name: shares.processes * nbytes for name, nbytes in all_phases[most].items()}
        on_host["frames"] = 2 * 4 * 3 * request.width * request.height * (request.num_frames if tiles != (1, 1) else 4)
        beside = _beside(residency, request, all_phases, sizes, item, room + total(libraries), shares)
        lacks = _lack(all_phases, on_host, budget, host)
        options.append(Option(residency, text, tiles, all_phases, beside, on_host, lacks))
    wanted = [o for o in options if placement.offload in ("auto", o.residency.kind)]
    chosen = next((option for option in wanted if not option.lacks), None)
    # An mp4 of 0.15 bytes a pixel at most, by what was seen; the state: latents and the solver's copies.
    disk = int(0.15 * request.width * request.height * request.num_frames)
    disk += SOLVER_COPIES * 4 * prod(request.latent_shape)
    below = options[options.index(chosen) :] if chosen else []
    if shares.world > 1:
        below = []  # who runs out of memory alone cannot go on otherwise than the others do
    ladder = [chosen.residency] if chosen and shares.world > 1 else []
    ladder += [rung for option in below for rung in dict.fromkeys((option.residency, _bare(option.residency)))
              if HOST_BASE[device] + total(host_terms(rung, sizes, item)) <= host.free]  # fmt: skip
    return Plan(options, chosen, ladder, disk, gpu, placement.gpu_memory_limit, host)


def _bare(residency: Residency) -> Residency:
    """Without resident blocks. One expert has room in the host's memory then or none has."""
    return replace(residency, resident_blocks=0)


def require(
    request: Request, precision: Precision, placement: Placement, sizes: Sizes, gpu: Room | None, host: Room,
    shares: Shares = Shares(),  # noqa: B008 (frozen)
) -> Plan:  # fmt: skip
    """A plan that has a chosen placement. Raises DoesNotFit, naming what would fit."""
    plan = make_plan(request, precision, placement, sizes, gpu, host, shares=shares)
    if plan.chosen:
        return plan
    asked = next((o for o in plan.options if o.residency.kind == placement.offload), plan.options[-1])
    has = f"{gib(host.free)} of host memory" + (f", {gib(plan.gpu_free)} of GPU memory" if plan.gpu else "")
    raise DoesNotFit(f"it does not fit: {asked.residency.kind}: {asked.lacks}; free: {has}",
                     hint=_what_would_fit(plan, request, precision, placement, sizes, shares))  # fmt: skip


def rooms(gpu: str | None = None, host: str | None = None, device: str = "auto") -> tuple[Room | None, Room]:
    """This machine's GPU, where it has one, and host memory; `24GiB` stands for what is free of either instead. Raises
    RequestError."""
    card: Room | None = None
    if gpu != "0" and device != "cpu":
        card = gpu_memory("cuda" if device == "auto" else device)
        if gpu:
            free = parse_bytes("--gpu-memory", gpu)
            card = Room(free, free, "a GPU")
    if host:
        free = parse_bytes("--host-memory", host)
        return card, Room(free, free)
    return card, host_memory()


def require_here(
    request: Request, precision: Precision, placement: Placement, sizes: Sizes,
    shares: Shares = Shares(),  # noqa: B008 (frozen)
) -> Plan:  # fmt: skip
    """`require_any` on this machine, before torch is imported. Raises DoesNotFit."""
    return require_any(request, precision, placement, sizes, *rooms(device=placement.device), shares)[0]


def require_disk(plan: Plan, output: Path) -> None:
    """Room for the video and its state beside it, where no run is to go on that has its own. Raises DoesNotFit."""
    folder = output.absolute().parent
    try:
        if any(folder.glob(f"*{STATE}")):
            return
        room = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.is_dir()))
    except (OSError, StopIteration):  # which writing will tell
        return
    if room.total and room.free < plan.disk_bytes:
        said = f"{folder}: the video and its state need {mib(plan.disk_bytes)} of disk, {mib(room.free)} are free"
        raise DoesNotFit(said, hint="free space, or name an --output on another disk")


def require_any(
    request: Request, precision: Precision, placement: Placement, sizes: Sizes, gpu: Room | None, host: Room,
    shares: Shares,
) -> tuple[Plan, bool]:  # fmt: skip
    """`require`, and whether experts are sharded in it: where they are asked to be, or where it is what lets several
    ranks hold them. Raises DoesNotFit."""
    if shares.world == 1 or shares.shards > 1:
        return require(request, precision, placement, sizes, gpu, host, shares), shares.shards > 1
    try:
        return require(request, precision, placement, sizes, gpu, host, shares), False
    except DoesNotFit:
        if precision.resolve("cuda" if gpu else "cpu").scope:
            raise  # weights in 8 bits are not sharded
        return require(request, precision, placement, sizes, gpu, host, replace(shares, shards=shares.world)), True


def require_gpus(placement: Placement, team: Team) -> None:
    """As many as `--gpus` asks for, before that many processes are started. Raises RequestError."""
    world = placement.gpus or 1
    if world == 1 or placement.device == "cpu" or team.world > 1:
        return
    there = next((n for n in range(world) if not gpu_memory(f"cuda:{n}")), world)
    if there < world and (there or placement.device == "cuda"):  # without any, the device is the CPU
        raise RequestError(f"--gpus {world}: there {'is' if there == 1 else 'are'} {there} here")


def spread(
    request: Request, placement: Placement, sizes: Sizes, team: Team = Team(),  # noqa: B008 (frozen)
    guided: bool | None = None,
) -> tuple[Mesh, Shares]:  # fmt: skip
    """How a request is spread over the processes that there are, or that `--gpus` asks for, and what each has of it.
    guided: as if the request was, or was not. Raises RequestError for what cannot work."""
    world = placement.gpus or team.world
    if world == 1:
        return Mesh(), Shares()
    local = team.local_world if team.world > 1 else world
    mesh = choose_mesh(world, local, sizes.num_heads, tokens_of(request), request.guided if guided is None else guided,
                       placement.ulysses_size, placement.ring_size)  # fmt: skip
    experts, text = (world if sharded else 1 for sharded in (placement.dit_fsdp, placement.t5_fsdp))
    return mesh, Shares(world, mesh.sequence, experts, text, local)


def seconds(
    plan: Plan, request: Request, precision: Precision, sizes: Sizes, mesh: Mesh, evaluations: int,
    file: str | None = None,
) -> Time | None:  # fmt: skip
    """Of a run on one GPU, by measured rates: the file's, or the card's; None where there are none, and where blocks
    come from a disk. Raises RequestError for a file of none."""
    if mesh.world > 1:
        if file is not None:
            raise RequestError("--rates is of one GPU", hint="several: scripts/bench_parallel.py --predict")
        return None
    resolved = precision.resolve("cuda" if plan.gpu else "cpu")
    rates = choose_rates(resolved, sizes.dim, plan.gpu.name if plan.gpu else None, file)
    if not rates or not plan.chosen or plan.chosen.residency.kind == "disk":
        return None
    return rates.time(request, tokens_of(request), sizes.num_layers, evaluations, resolved)


def describe(plan: Plan) -> str:
    """The chosen placement in a line."""
    assert plan.chosen
    chosen, reserve = plan.chosen, GPU_RESERVE if plan.gpu else 0
    needs = f"{gib(chosen.gpu_bytes + reserve)} of GPU memory, {gib(chosen.host_bytes)} of host memory"
    return f"--offload {chosen.residency.kind}: {needs if plan.gpu else gib(chosen.host_bytes)}"


def _what_would_fit(
    plan: Plan, request: Request, precision: Precision, placement: Placement, sizes: Sizes, shares: Shares
) -> str:
    """Another placement, or half the bytes, or a smaller video."""
    if other := next((option for option in plan.options if not option.lacks), None):
        return f"this would fit: --offload {other.residency.kind}, or --offload auto"
    anywhere = replace(placement, offload="auto")
    if precision.resolve("cuda" if plan.gpu else "cpu").weights == "float32":  # as a CPU has them
        halved = replace(precision, weights="bf16")
        if make_plan(request, halved, anywhere, sizes, plan.gpu, plan.host, shares=shares).chosen:
            return "this would fit: --dtype bf16, with --offload auto"
    for width, height, frames in SMALLER:
        smaller = replace(request, width=width, height=height, num_frames=min(frames, request.num_frames))
        if tokens_of(smaller) < tokens_of(request) and make_plan(
            smaller, precision, anywhere, sizes, plan.gpu, plan.host, shares=shares
        ).chosen:
            return f"this would fit: --size {width}x{height} --frames {smaller.num_frames}"
    return "no size of video would fit; see: wan22 plan"


def _residencies(
    sizes: Sizes, item: int, device: str, budget: int | None, activations: int, host: Room, shares: Shares
) -> Iterator[Residency]:
    """The best form of each kind: as many blocks resident and as many experts in pinned memory as fit."""
    expert, block = sizes.expert_bytes(item), sizes.block_bytes(item)
    pinnable = int(0.9 * max(0, host.free - HOST_BASE[device]))
    copies = min(2, pinnable // expert) if device == "cuda" else 0
    yield Residency("none")
    if shares.world > 1:  # a copy for each would be many; and blocks come and go between ranks already
        yield Residency("expert")
        return
    yield Residency("expert", 0, min(1, copies))
    resident = 0
    if budget is not None:
        resident = max(0, (budget - activations - sizes.rest_bytes(item)) // block - 2)
        resident = min(resident, sizes.num_layers - 2) // 2 * 2
    yield Residency("block", resident, max(1, copies))
    yield Residency("disk", resident, 0)


def _beside(
    residency: Residency, request: Request, phases: dict[str, Terms], sizes: Sizes, item: int, room: int, shares: Shares
) -> dict[str, Terms]:
    """What pipeline.py has on the device for time's sake, in `room` bytes: the first expert while the text is encoded,
    in the page cache alone where it will be streamed; both experts while the VAE decodes, whole."""
    beside: dict[str, Terms] = {}
    expert = -(-sizes.expert_bytes(item) // shares.shards)
    early = {"first expert": expert, **reading_terms(request, sizes, item)}
    if total(phases["text"]) + total(early) + (shares.world > 1) * COMMUNICATORS <= room:
        beside["text"] = early if residency.kind in ("none", "expert") else {"first expert, in the page cache": 0}
    if residency.kind == "none" and total(phases["decode"]) + 2 * expert <= room:
        beside["decode"] = {"experts": 2 * expert}
    return beside


def _text_mode(sizes: Sizes, item: int, budget: int | None, shards: int = 1) -> str:
    for mode in ("device", "stream"):
        if budget is None or total(text_terms(mode, sizes, item, shards)) <= budget:
            return mode
    return "cpu"


def pick_tiles(latent_shape: Sequence[int], sizes: Sizes, room: int, item: int = 4, ranks: int = 1) -> Grid:
    """The coarsest grid of the VAE's tiles, one a rank or more, that fits into `room` bytes; the finest where none
    does. item: bytes of the decoder's dtype."""
    tiles: Grid = rank_grid(latent_shape, ranks)
    while total(decode_terms(latent_shape, sizes.vae_width, tiles, item)) > room and (
        grid := finer(tiles, latent_shape)
    ):
        tiles = grid
    return tiles


def _lack(phases: dict[str, Terms], on_host: Terms, budget: int | None, host: Room) -> str:
    for phase, terms in phases.items():
        if budget is not None and total(terms) > budget:
            return f"{phase} needs {gib(total(terms) + GPU_RESERVE)} of GPU memory"
    return f"host memory: needs {gib(total(on_host))}" if total(on_host) > host.free else ""


def gib(nbytes: float) -> str:
    return f"{nbytes / 2**30:.1f} GiB"


def mib(nbytes: float) -> str:
    return f"{nbytes / 2**20:.1f} MiB"


# --- for people, and programs ----------------------------------------------------------------------------------------
def as_text(plan: Plan, request: Request, sizes: Sizes) -> str:
    """The placements side by side, within 80 columns."""
    where = f"{plan.gpu.name or 'a GPU'}, {gib(plan.gpu_free)} to use; " if plan.gpu else "on the CPU; "
    lines = [
        f"{request.width}x{request.height}, {request.num_frames} frames: {tokens_of(request):,} tokens a step",
        f"{where}host memory {gib(plan.host.free)} free",
        "",
        f"{'':<19}{'GPU memory, GiB' if plan.gpu else 'its part of memory, GiB':^25}{'host':>7}",
        f"{'--offload':<19}{'text':>7}{'denoise':>9}{'decode':>9}{'GiB':>7}  fits",
    ]
    reserve = GPU_RESERVE if plan.gpu else 0
    for option in plan.options:
        kind, resident = option.residency.kind, option.residency.resident_blocks
        text, denoise, decode = ((option.peak(phase) + reserve) / 2**30 for phase in ("text", "denoise", "decode"))
        fits = "no: " + option.lacks.split()[0].rstrip(":") if option.lacks else "yes"
        fits = "yes, and taken" if option is plan.chosen else fits
        name = f"{kind:<7}" + (f"{resident} of {sizes.num_layers}" if resident else "")
        lines.append(f"{name:<19}{text:7.1f}{denoise:9.1f}{decode:9.1f}{option.host_bytes / 2**30:7.1f}  {fits}")
    shown = plan.chosen or plan.options[-1]
    encoder = {"device": "on the GPU" if plan.gpu else "on the CPU", "stream": "streamed to the GPU layer by layer",
               "cpu": "on the CPU"}  # fmt: skip
    early, kept = ((shown.taken(phase) + reserve) / 2**30 for phase in ("text", "decode"))
    lines += [""] * any(map(total, shown.beside.values()))
    if total(shown.beside.get("text", {})):
        lines += [f"room to spare: the first expert comes beside the text encoder, {early:.1f} GiB"]
    if total(shown.beside.get("decode", {})):
        lines += [f"room to spare: both experts stay while the VAE decodes, {kept:.1f} GiB"]
    tiles = "whole" if shown.tiles == (1, 1) else f"in {shown.tiles[0]} x {shown.tiles[1]} tiles"
    lines += ["", f"text encoder {encoder[shown.text_encoder]}, VAE {tiles}",
              f"disk: {gib(sizes.files)} of weights, {gib(plan.disk_bytes)} for the video and its state"]  # fmt: skip
    return "\n".join(lines)


def as_dict(plan: Plan) -> dict[str, Any]:
    """The whole plan, term by term, in bytes."""
    return {
        "gpu": vars(plan.gpu) if plan.gpu else None,
        "gpu_limit": plan.gpu_limit,
        "host": vars(plan.host),
        "disk_bytes": plan.disk_bytes,
        "chosen": plan.chosen.residency.kind if plan.chosen else None,
        "options": [
            {"offload": option.residency.kind, "resident_blocks": option.residency.resident_blocks,
             "host_experts": option.residency.host_experts, "text_encoder": option.text_encoder,
             "vae_tiles": list(option.tiles), "lacks": option.lacks, "gpu_reserve_bytes": GPU_RESERVE,
             "phases": option.phases, "beside": option.beside, "host": option.host}
            for option in plan.options
        ],
    }  # fmt: skip
