"""A guided step at 720p on one GPU and on several: seconds, memory, time in communication; and predictions from these.

    torchrun --nproc_per_node=2 scripts/bench_parallel.py         # random weights of the published size; about a minute
    torchrun --nproc_per_node=2 scripts/bench_parallel.py --modes one,ulysses,ring,sharded
    torchrun --nproc_per_node=2 scripts/bench_parallel.py --tiny  # on CPUs: that all of it runs
    python scripts/bench_parallel.py --predict FORWARD RATE BESIDES  # four and eight GPUs from: seconds of a forward
                                                     # pass on one, GB/s a rank sends at, seconds besides the steps
    python scripts/bench_parallel.py --size 480p --predict …        # for another size than 720p

A guided step is two forward passes. `one` measures one of them, on the first rank alone, and doubles it. `over` is
what a step takes longer than that divided by the ranks, and `sent at` the bytes a rank sends over these seconds, which
is the RATE of a prediction. `messages` is all of them without any attention between, `copies` the part of it that packs
and unpacks. `exposed` is what a step takes longer than with its messages left out: a rank then attends to what it
sends, as many numbers of the same size. (Not to zeros: of them a GPU makes faster work, since it draws less power.) The
clock is the first rank's, between points at which all ranks have finished.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from wan22.config import Request, configs_dir, parse_size
from wan22.several.launch import Team, team_of
from wan22.several.mesh import Mesh

GIB = 1 << 30
MODES = {  # the mesh of n ranks, and whether experts are sharded
    "one": lambda n: (Mesh(), False),
    "guidance": lambda n: (Mesh(2, 1, n // 2), False),
    "ulysses": lambda n: (Mesh(1, 1, n), False),
    "ring": lambda n: (Mesh(1, n, 1), False),
    "sharded": lambda n: (Mesh(1, 1, n), True),
}
PUBLISHED = {"H100": {1: 1041.5, 8: 155.1}, "A100": {1: 2735.7, 8: 386.7}}  # seconds of a video; the model's README


def predicted_step(forward: float, rate: float, mesh: Mesh, tokens: int, dim: int, layers: int) -> float:
    """Seconds of a guided step.

    2 / G forward passes, each of F / S seconds of arithmetic, and of messages: per block and rank q, k, v and what is
    attended, 4 · (L / S) · E numbers of 2 bytes, of which all but a U-th go to others. `rate`: bytes a second that a
    rank was measured to send over all that dividing costs, copies, waits and what travels beside work included.
    F: `forward`; S, U, G: ranks along the mesh's axes.
    """
    numbers = 4 * tokens / mesh.sequence * dim * (1 - 1 / mesh.ulysses)
    return 2 / mesh.guidance * (forward / mesh.sequence + layers * numbers * 2 / rate)


def predict(forward: float, gigabytes: float, besides: float, size: str) -> None:
    config = json.loads((configs_dir() / "Wan2.2-T2V-A14B/high_noise_model/config.json").read_text())
    steps, (width, height) = Request("x").num_steps, parse_size(size)
    tokens = (1 + (Request("x").num_frames - 1) // 4) * (height // 16) * (width // 16)
    one = 2 * forward * steps + besides
    print(f"{size}, {tokens:,} tokens: predicted from {forward:g} s a forward pass, {gigabytes:g} GB/s, {besides:g} s "
          f"besides {steps} steps\n")  # fmt: skip
    print(f"{'GPUs':>5}  {'mesh':<27}{'video, s':>10}{'speed-up':>10}")
    print(f"{1:>5}  {'':<27}{one:>10.1f}{1:>10.2f}")
    for mesh in (Mesh(2, 1, 1), Mesh(2, 1, 2), Mesh(1, 1, 4), Mesh(2, 1, 4), Mesh(1, 1, 8)):
        step = predicted_step(forward, gigabytes * 1e9, mesh, tokens, config["dim"], config["num_layers"])
        video = steps * step + besides
        print(f"{mesh.world:>5}  {mesh!s:<27}{video:>10.1f}{one / video:>10.2f}")
    for card, seconds in PUBLISHED.items():
        faster = seconds[1] / seconds[8]
        print(f"published, 720p, {card}: {seconds[1]} s on one, {seconds[8]} s on eight ({faster:.1f} times)")


class Bench:
    """One rank's part of the measurements."""

    def __init__(self, team: Team, tiny: bool) -> None:
        from wan22.attention import Shape, choose
        from wan22.model import TransformerConfig

        config = json.loads((configs_dir() / "Wan2.2-T2V-A14B/high_noise_model/config.json").read_text())
        known = TransformerConfig.__dataclass_fields__
        self.config = TransformerConfig(**{key: value for key, value in config.items() if key in known})
        self.latents = (1, 16, 21, 90, 160)
        if tiny:
            self.config = TransformerConfig(256, 512, 4, 4, text_dim=64)
            self.latents = (1, 16, 3, 12, 20)
        self.team = team
        self.dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.tokens = self.latents[2] * self.latents[3] * self.latents[4] // 4
        self.seed = torch.Generator(self.device).manual_seed(1)
        shape = Shape(self.tokens, self.config.num_heads, self.config.head_dim)
        self.attention = choose("auto", shape, self.device, self.dtype)

    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Random numbers of a trained model's size, made where they are to be."""
        for name, tensor in tensors.items():
            if tensor.ndim == 1:
                tensor.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
            else:
                tensor.normal_(std=self.config.dim**-0.5, generator=self.seed)

    def model(self, mesh: Mesh, sharded: bool) -> tuple[Any, Any]:
        """A model and what evaluates it; its weights are this rank's only ones."""
        from wan22.load import assemble, room_for
        from wan22.model import WanTransformer
        from wan22.parallel import Ranks
        from wan22.residency.memory import memory_of
        from wan22.several.sharding import shard_expert

        with torch.device("meta"):
            model = WanTransformer(self.config, self.dtype)
        if sharded:
            self.fill(shard_expert(model, self.attention, memory_of(self.device), self.team.world)[0])
        else:
            state = room_for(model, self.device)
            self.fill(state)
            assemble(model, state, self.attention)
        if mesh.world == 1:
            return model, None
        ranks = Ranks(self.team, mesh, self.device, sharded)
        ranks.split(model)
        return model, ranks

    def inputs(self) -> tuple[Tensor, Tensor]:
        latents = torch.randn(self.latents, generator=self.seed, device=self.device)
        return latents, torch.tensor([900.0], device=self.device)

    def settle(self) -> None:
        import torch.distributed as dist

        if self.device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()

    def clock(self, run: Callable[[], object]) -> float:
        self.settle()
        start = time.perf_counter()
        run()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        self.settle()
        return seconds

    def measure(self, mode: str) -> dict[str, Any]:
        import gc

        result = self._measure(mode)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return result

    @torch.inference_mode()
    def _measure(self, mode: str) -> dict[str, Any]:
        from wan22.sampling import evaluate

        mesh, sharded = MODES[mode](self.team.world)
        with torch.inference_mode(False), torch.no_grad():
            model, ranks = self.model(mesh, sharded)
        context = torch.randn(1, 100, self.config.text_dim, generator=self.seed, device=self.device)
        keys = model.embed_context(context)
        latents, timestep = self.inputs()
        blocks, how = model.blocks, ranks.evaluate if ranks else evaluate
        guided = mesh.guidance == 2

        def run(count: int = 0) -> None:
            """A step's passes, or one of them; with the first blocks alone, which is enough to warm up."""
            if count:
                model.blocks = blocks[:count]
            some = keys[: count or None]
            how(model, latents, timestep, some, some if guided else None)
            model.blocks = blocks

        idle = mode == "one" and self.team.rank
        if not sharded and not idle:
            run(1)
        elif sharded:
            run()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if ranks:
            ranks.counts.bytes_sent = 0
        seconds = self.clock((lambda: None) if idle else run)
        passes = 1 if guided else 2
        result: dict[str, Any] = {"mode": mode, "mesh": str(mesh), "step": passes * seconds, "sharded": sharded}
        if self.device.type == "cuda":
            result["memory"] = torch.cuda.max_memory_allocated() / GIB
        if ranks and mesh.sequence > 1:
            result["sent"] = passes * ranks.counts.bytes_sent
            result["messages"] = passes * self.messages(ranks)
            if not sharded and mesh.ring == 1:
                ranks._exchange = stay
                result["copies"] = passes * self.messages(ranks)
                result["exposed"] = result["step"] - passes * self.clock(run)
        return result

    def messages(self, ranks: Any) -> float:
        """Seconds of a forward pass's exchanges alone, with the copies around them, from those of two blocks."""
        length = ranks._lengths[ranks.layout.order]
        size = (1, length, self.config.num_heads, self.config.head_dim)
        q, k, v = (torch.zeros(size, dtype=self.dtype, device=self.device) for _ in range(3))

        def run() -> None:
            for _ in range(2):
                ranks.attend(lambda q, k, v: q.new_empty(q.shape), q, k, v)

        run()
        return self.clock(run) / 2 * self.config.num_layers


def stay(send: Tensor, sizes: list[int], back: list[int]) -> Tensor:
    """In place of a message: what would have gone is what comes."""
    return send if len(send) == sum(back) else send.repeat(-(-sum(back) // len(send)))[: sum(back)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", default="one,guidance,ulysses", help=f"of {', '.join(MODES)}")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json", action="store_true", help="the measurements, one JSON object")
    parser.add_argument("--predict", nargs=3, type=float, metavar=("FORWARD", "GB/S", "BESIDES"))
    parser.add_argument("--size", default="720p", help="of the prediction")
    options = parser.parse_args()
    if options.predict:
        forward, gigabytes, besides = options.predict
        predict(forward, gigabytes, besides, options.size)
        return
    import os

    from wan22.parallel import meet

    team = team_of(os.environ)
    if team.world < 2:
        parser.error("run it by torchrun, with two processes or more")
    member = meet(team)
    bench = Bench(team, options.tiny)
    rows = [bench.measure(mode.strip()) for mode in options.modes.split(",")]
    if team.rank == 0:
        name = torch.cuda.get_device_name() if bench.device.type == "cuda" else "CPU"
        if options.json:
            print(json.dumps({"device": name, "world": team.world, "torch": torch.__version__, "rows": rows}))
        else:
            how = f"torch {torch.__version__}, attention {bench.attention}; {bench.tokens:,} tokens"
            show(rows, f"{team.world} × {name}, {how}", team.world)
    member.leave()
    torch.distributed.destroy_process_group()


def show(rows: list[dict[str, Any]], title: str, world: int) -> None:
    one = next((row["step"] for row in rows if row["mode"] == "one"), None)
    names = ("step, s", "speed-up", "over, s", "GiB", "messages, s", "copies, s", "exposed, s", "sent at, GB/s")
    print(f"{title}; a guided step\n")
    print(f"{'':<14}" + "".join(f"{name:>{len(name) + 3}}" for name in names))
    for row in rows:
        over = row["step"] - one / world if one and row["mode"] != "one" else None
        rate = row["sent"] / over / 1e9 if over and over > 0 and "sent" in row and not row["sharded"] else None
        values = ((row["step"], 3), (one and one / row["step"], 3), (over, 3), (row.get("memory"), 1),
                  *((row.get(name), 3) for name in ("messages", "copies", "exposed")), (rate, 0))  # fmt: skip
        cells = ["" if value is None else f"{value:.{digits}f}" for value, digits in values]
        print(f"{row['mode']:<14}" + "".join(f"{cell:>{len(n) + 3}}" for n, cell in zip(names, cells, strict=True)))


if __name__ == "__main__":
    main()
