"""Trains the embedded demo: a tokenizer, a video VAE, a text encoder and two small experts, on videos it draws itself.

    python scripts/train_demo.py tokenizer                              then, each with --minutes N:
    python scripts/train_demo.py vae, words, high, low, vae --decoder-only
    python scripts/train_demo.py sheet, export, pack

`vae` comes before the experts, whose clips it encodes, and `words` too: a text encoder that can tell what a caption
says then stays as it is. `high`, `low` and `vae --decoder-only` (which sharpens the pictures and leaves the latents
alone) do not know of each other: several GPUs train them at the same time. Each stage keeps its state in the work
folder and goes on from there; what is missing there is taken from the package's own demo. The learning rate follows the
share of `--total-minutes` that has passed, so a stage ends annealed whatever the machine's speed; `--minutes` bounds a
command.

Legend: B batch, C latent channels, T H W latent grid (F = 4 (T - 1) + 1 frames of 8H x 8W pixels), N scenes, K captions
of each, M text tokens, E text width.
"""

import argparse
import contextlib
import json
import random
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import demo_data
import demo_vae
import torch
import torch.nn.functional as F
from demo_models import EXPERT, Models, judge
from demo_training import (
    ROOT,
    SPEC,
    Average,
    Bank,
    Clock,
    Size,
    autocast,
    make_bank,
    save,
    say,
    set_up,
    wait,
)
from torch import Tensor, nn

from wan22.files.tensor_names import TEXT_ENCODER_FROM_TRANSFORMERS, published_vae_name, rename

PARTS = ("words", "high", "low")
VOCABULARY = 1400
CLIP_SHARE = 0.25  # of an expert's time goes into new clips
EXPERT_SIZES = (
    Size(128, 128, 33, 0.90, 64, 49152), Size(96, 96, 17, 0.05, 128, 16384), Size(64, 64, 9, 0.05, 256, 16384),
)  # fmt: skip
TINY_EXPERT_SIZES = (Size(64, 64, 9, 0.8, 8, 64), Size(96, 96, 17, 0.2, 2, 8))


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer


def train_tokenizer(args: argparse.Namespace) -> None:
    """A small byte-pair tokenizer: lower case, NFKC, Chinese characters apart, bytes for what it has never seen."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    rng = random.Random(0)
    texts = [demo_data.caption(demo_data.sample_scene(rng), rng) for _ in range(3000 if args.tiny else 30000)]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(prepend_scheme="always"),
            pre_tokenizers.Split(Regex(r"[\u2E80-\u9FFF\uF900-\uFAFF]"), "isolated"),
            pre_tokenizers.Punctuation("isolated"),
        ]
    )
    # Letters, digits and the characters of the published negative prompt have pieces of their own, used or not.
    alphabet = sorted(
        {
            *"abcdefghijklmnopqrstuvwxyz0123456789 .,!?:;-'()\"\u2581",
            *tokenizer.normalizer.normalize_str(SPEC.negative_prompt),
        }
    )
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, min_frequency=10, show_progress=False, initial_alphabet=alphabet,
        special_tokens=special + [f"<0x{byte:02X}>" for byte in range(256)],
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    trained = json.loads(tokenizer.to_str())
    trained["added_tokens"] = []  # the bytes are pieces for what has none, not words to look for in a text
    tokenizer = Tokenizer.from_str(json.dumps(trained))
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always"), decoders.Fuse()]
    )
    folder = args.work / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {
        "eos_token": "</s>", "extra_special_tokens": {}, "model_max_length": SPEC.text_len, "pad_token": "<pad>",
        "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    lengths = sorted(len(tokenizer.encode(text).ids) for text in texts[:3000])
    say(
        f"tokenizer: {tokenizer.get_vocab_size()} pieces; captions of {lengths[1500]} tokens (median), "
        f"{lengths[-1]} at most"
    )
    for text in (
        texts[0],
        "A red circle moves to the left on a white background.",
        "红色的圆形向左移动，白色背景",
        "zebra Ünïcode 🦓",
    ):
        encoding = tokenizer.encode(text)
        say(f"  {encoding.tokens} → {tokenizer.decode(encoding.ids)!r}")


# ---------------------------------------------------------------------------------------------------------------------
# Text encoder and experts


class Pool:
    """Encoded clips of one size, ever more of them and then ever newer: a ring in the device's memory."""

    def __init__(self, models: Models, bank: Bank, size: Size) -> None:
        self.models, self.bank, self.size, self.made = models, bank, size, 0
        self.latents = torch.zeros(size.pool, 16, *size.latent, dtype=torch.float16, device=models.device)
        self.scenes = torch.zeros(size.pool, dtype=torch.long, device=models.device)

    def add(self, count: int) -> None:
        count = min(count, self.size.pool)
        scenes = (torch.arange(count, device=self.models.device) + self.made) % len(self.bank.packed)
        places = (torch.arange(count, device=self.models.device) + self.made) % self.size.pool
        self.latents[places] = self.models.encode(self.bank.packed[scenes], self.size).half()
        self.scenes[places] = scenes
        self.made += count

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Latents float32 [B, C, T, H, W] and the scenes they show [B]."""
        chosen = torch.randint(min(self.made, self.size.pool), (count,), device=self.models.device)
        return self.latents[chosen].float(), self.scenes[chosen]


def draw_sigmas(count: int, high: bool, device: torch.device) -> Tensor:
    """Noise levels [B] of one expert's side, spread as schedules of shift 5 to 8 spread them."""
    shift = 5 + 3 * torch.rand(count, device=device)
    edge = SPEC.boundary / (shift - (shift - 1) * SPEC.boundary)  # where the shifted level crosses the boundary
    u = torch.rand(count, device=device)
    u = edge + u * (1 - edge) if high else u * edge
    return shift * u / (1 + (shift - 1) * u)


def nothing_ids(models: Models, bank: Bank) -> Tensor:
    """Token ids of what is to mean nothing, int64 [K, M]: the empty prompt, or (1 in 4) a piece of the negative one."""
    tokens = models.tokenizer.encode(SPEC.negative_prompt).ids[:-1]
    width, rng = bank.ids.shape[2], random.Random(0)
    table = torch.zeros(64, width, dtype=torch.long)
    table[:, 0] = 1
    for row in table[48:]:
        length = rng.randint(20, width - 1)
        start = rng.randint(0, max(0, len(tokens) - length))
        piece = [*tokens[start : start + length], 1]
        row[: len(piece)] = torch.tensor(piece)
    return table.to(models.device)


@dataclass
class Trainer:
    """The optimizer of one part, the average of its weights, and what of both is on the disk."""

    models: Models
    name: str
    clock: Clock
    peak: float

    def __post_init__(self) -> None:
        self.module = self.models.part(self.name)
        state = self.models.load(self.name, averaged=False)
        self.clock.before, self.step = state.get("elapsed", 0.0), state.get("step", 0)
        parameters = list(self.module.parameters())
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if p.ndim >= 2]},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        fused = self.models.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(groups, lr=self.peak, betas=(0.9, 0.99), weight_decay=0.01, fused=fused)
        self.average = Average({"": self.module}, 0.9995)
        for parameter in parameters:  # in place from now on: a captured graph adds to just these
            parameter.grad = torch.zeros_like(parameter)
        if state:
            self.average.load(state["average"])
            self.average.steps = self.step
            if "optimizer" in state:
                self.optimizer.load_state_dict(state["optimizer"])

    def update(self) -> None:
        """One step with the gradients that lie ready."""
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.clock.learning_rate(self.peak)
        self.optimizer.step()
        self.average.update()
        self.step += 1

    def save(self, whole: bool = True) -> None:
        """whole: with what going on needs; else the average alone."""
        state = {"average": self.average.value, "step": self.step, "elapsed": self.clock.elapsed}
        if whole:
            own = {f".{name}": p.detach() for name, p in self.module.named_parameters()}
            state |= {"own": own, "optimizer": self.optimizer.state_dict()}
        save(self.models.work / f"{self.name}.pt", state)


def train_words(args: argparse.Namespace) -> None:
    """The text encoder, until it can tell what a caption says; from then on it stays as it is."""
    device = set_up(args)
    models = Models(args.work, device)
    trainer = Trainer(models, "words", Clock(args.minutes, args.total_minutes, 0), args.lr)
    bank = make_bank(400 if args.tiny else 100000, 3, 7, args.work, device)
    blank = nothing_ids(models, bank)
    batch = 32 if args.tiny else 512 if device.type == "cuda" else 64
    clock, sums, count, reported = trainer.clock, torch.zeros(2, device=device), 0, 0.0
    while not clock.over:
        scenes = torch.randint(len(bank.packed), (batch,), device=device)
        captions = torch.randint(bank.ids.shape[1], (batch,), device=device)
        dropped = torch.rand(batch, device=device) < 0.05
        empty = blank[torch.randint(len(blank), (batch,), device=device)]
        ids = torch.where(dropped[:, None], empty, bank.ids[scenes, captions].long())
        labels = torch.where(dropped[:, None], -100, bank.labels(scenes, captions))
        with autocast(device):
            loss, right = models.heads(*models.context(ids), labels)
        trainer.optimizer.zero_grad(set_to_none=False)
        loss.backward()
        trainer.update()
        sums, count = sums + torch.stack((loss.detach(), right)), count + 1
        if clock.here - reported > args.log_every:
            loss_mean, right_mean = (sums / count).tolist()
            say(f"words {clock.elapsed:5.0f} s  step {trainer.step}  {count / (clock.here - reported):.1f} steps/s  "
                f"loss {loss_mean:.4f}, {100 * right_mean:.2f} % right")  # fmt: skip
            sums, count, reported = torch.zeros(2, device=device), 0, clock.here
    trainer.save()
    trainer.average.settle()
    with torch.no_grad():
        right = [models.heads(*models.context(bank.ids[part, 0].long()), bank.labels(part, torch.zeros_like(part)))[1]
                 for part in torch.arange(min(8192, len(bank.packed)), device=device).split(512)]  # fmt: skip
    say(f"words: {100 * torch.stack(right).mean().item():.2f} % right with the average of {trainer.step} steps")


@torch.no_grad()
def all_contexts(models: Models, ids: Tensor) -> Tensor:
    """Context rows of captions, bf16 where there is a GPU: ids [N, M] → [N, M, E]."""
    dtype = torch.bfloat16 if models.device.type == "cuda" else torch.float32
    return torch.cat([models.context(part.long())[0].to(dtype) for part in ids.split(2048)])


class Loss:
    """One step's loss and gradients for a size of clip, on a GPU as one captured graph: thousands of small kernels
    would wait for Python otherwise.

    The graph's inputs are the tensors `clean` [B, C, T, H, W], `rows` [B, M, E] and `sigma` [B], filled before `run`.
    """

    def __init__(self, expert: Any, size: Size, rows: Tensor, compiled: bool, capture: bool) -> None:
        device = rows.device
        self.expert, self.compiled = expert, compiled
        self.clean = torch.zeros(size.batch, 16, *size.latent, device=device)
        self.rows = torch.zeros(size.batch, *rows.shape[1:], device=device)
        self.sigma = torch.full((size.batch,), 0.5, device=device)
        self.sum = torch.zeros((), device=device)  # of the losses since somebody set it to zero
        self.graph: torch.cuda.CUDAGraph | None = None
        if capture and device.type == "cuda":
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    self._step()
            torch.cuda.current_stream().wait_stream(side)
            # The expert keeps the rotary table of one shape alone: the graph's must live as long as the graph.
            self.table = expert.rotary._last
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self._step()

    def _step(self) -> None:
        torch._foreach_zero_([p.grad for p in self.expert.parameters()])
        noise = torch.randn_like(self.clean)
        level = self.sigma.view(-1, 1, 1, 1, 1)
        noisy = (1 - level) * self.clean + level * noise
        device = self.clean.device
        eager = device.type == "cuda" and not self.compiled
        with (
            torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False),
            torch.compiler.set_stance("force_eager") if eager else contextlib.nullcontext(),
        ):
            velocity = self.expert(noisy, 1000 * self.sigma, self.expert.embed_context(self.rows))
        loss = F.mse_loss(velocity.float(), noise - self.clean)
        loss.backward()
        self.sum += loss.detach()

    def run(self) -> None:
        if self.graph:
            self.graph.replay()
        else:
            self._step()


def train_expert(args: argparse.Namespace) -> None:
    """The high-noise or the low-noise expert, on its side of the boundary alone."""
    device, high = set_up(args), args.stage == "high"
    start = time.monotonic()
    sizes = TINY_EXPERT_SIZES if args.tiny else EXPERT_SIZES
    models = Models(args.work, device)
    models.load("words")
    trainer = Trainer(models, args.stage, Clock(args.minutes, args.total_minutes, 0), args.lr)
    clock, expert = trainer.clock, models.experts[args.stage]
    clock.start = start  # the making of the bank counts
    bank = make_bank(400 if args.tiny else 100000, 3, 8 + trainer.step, args.work, device)
    contexts = all_contexts(models, bank.ids.flatten(0, 1)).view(*bank.ids.shape, -1)  # [N, K, M, E]
    blank = all_contexts(models, nothing_ids(models, bank))
    if device.type == "cuda" and args.compile:
        demo_vae.compile_norms()
        for block in expert.blocks:
            block.compile(dynamic=False)
    losses = [Loss(expert, size, blank, i == 0, args.graph) for i, size in enumerate(sizes)]
    wait(device)
    compiled = clock.here

    pools = [Pool(models, bank, size) for size in sizes]
    burst = 4 if args.tiny else 64
    for pool, bursts in zip(pools, (2, 2) if args.tiny else (48, 12, 12), strict=True):
        for _ in range(bursts):
            pool.add(burst)
    wait(device)
    began = clock.here
    for _ in range(1 if args.tiny else 8):
        pools[0].add(burst)
    wait(device)
    burst_seconds = (clock.here - began) / (1 if args.tiny else 8)
    say(f"ready after {clock.here:.0f} s, {clock.here - compiled:.0f} of them for clips; "
        f"{1000 * burst_seconds / burst:.2f} ms to draw and encode one; "
        f"{sum(p.numel() for p in expert.parameters()) / 1e6:.2f} M parameters, "
        f"{sum(p.numel() for p in models.text_encoder.parameters()) / 1e6:.2f} M in the text encoder")  # fmt: skip

    order = random.Random(trainer.step)
    count, reported, saved, encoding = 0, clock.here, clock.here, 0.0
    losses[0].sum.zero_()
    while not clock.over:
        index = order.choices(range(len(sizes)), [s.share for s in sizes])[0]
        loss, pool = losses[index], pools[index]
        clean, scenes = pool.draw(len(loss.clean))
        captions = torch.randint(contexts.shape[1], scenes.shape, device=device)
        dropped = torch.rand(len(scenes), device=device) < 0.13
        empty = blank[torch.randint(len(blank), scenes.shape, device=device)]
        loss.clean.copy_(clean)
        loss.rows.copy_(torch.where(dropped[:, None, None], empty, contexts[scenes, captions]))
        loss.sigma.copy_(draw_sigmas(len(scenes), high, device))
        loss.run()
        trainer.update()
        count += index == 0
        if encoding < CLIP_SHARE * (clock.here - reported):
            pools[0 if trainer.step % 8 else order.randrange(len(pools))].add(burst)
            encoding += burst_seconds
        if clock.here - reported > args.log_every:
            mean, seconds = losses[0].sum.item() / max(count, 1), clock.here - reported
            say(f"{args.stage} {clock.elapsed:5.0f} s  step {trainer.step}  {count / seconds:.1f} large steps/s  "
                f"loss {mean:.4f}  clips {[p.made for p in pools]}  "
                f"lr {trainer.optimizer.param_groups[0]['lr']:.1e}")  # fmt: skip
            losses[0].sum.zero_()
            count, reported, encoding = 0, clock.here, 0.0
        if clock.here - saved > 100:
            trainer.save()
            saved = clock.here
    trainer.save()
    say(f"{args.stage}: {trainer.step} steps, {clock.elapsed:.0f} s of {clock.total:.0f} s")


def sheet(args: argparse.Namespace) -> None:
    """What the trained parts make of prompts whose combinations they never saw: counts, and a picture."""
    models = Models(args.work, set_up(args))
    for name in PARTS:
        models.load(name)
    size = TINY_EXPERT_SIZES[0] if args.tiny else EXPERT_SIZES[0]
    judge(models, size, args.prompts, args, args.out_file or args.work / "sheet.png")


# ---------------------------------------------------------------------------------------------------------------------
# Export


def export(args: argparse.Namespace) -> None:
    """Writes the checkpoint in the published layout, bf16. The same weights give the same bytes."""
    from safetensors.torch import save_file

    models = Models(args.work, torch.device("cpu"))
    states = {name: models.load(name) for name in PARTS}

    def write(tensors: dict[str, Tensor], path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        contiguous = {name: tensors[name].detach().bfloat16().contiguous() for name in sorted(tensors)}
        save_file(contiguous, path, metadata={"format": "pt"})

    out = args.out
    sizes = {"_class_name": "WanModel", "_diffusers_version": "0.33.0", "model_type": "t2v", "eps": 1e-6}
    config = sizes | EXPERT | {"in_dim": 16, "out_dim": 16, "text_len": SPEC.text_len}
    for name, expert in zip(SPEC.experts, models.experts.values(), strict=True):
        tensors = dict(sorted(expert.state_dict().items()))
        half, before = sum(t.numel() for t in tensors.values()) / 2, 0
        shards: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        weight_map = {}
        for key, tensor in tensors.items():
            shard = int(before >= half)
            shards[shard][key] = tensor
            weight_map[key] = f"diffusion_pytorch_model-{shard + 1:05d}-of-00002.safetensors"
            before += tensor.numel()
        for i, shard_tensors in enumerate(shards):
            write(shard_tensors, out / name / f"diffusion_pytorch_model-{i + 1:05d}-of-00002.safetensors")
        index = {"metadata": {"total_size": 2 * before}, "weight_map": weight_map}
        _write_json(index, out / name / "diffusion_pytorch_model.safetensors.index.json")
        _write_json(config, out / name / "config.json")
    # The embedding is shared with a second name for it, which the published file does not have.
    text = {rename(name, TEXT_ENCODER_FROM_TRANSFORMERS): p for name, p in models.text_encoder.named_parameters()}
    write(text, out / "models_t5_umt5-xxl-enc-bf16.safetensors")
    write({published_vae_name(n): p for n, p in models.vae.named_parameters()}, out / "Wan2.1_VAE.safetensors")
    _write_json({"framework": "Pytorch", "task": "text-to-video"}, out / "configuration.json")
    folder = out / "google/umt5-xxl"
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        if (trained := args.work / "tokenizer" / file).exists():
            (folder / file).write_bytes(trained.read_bytes())
    total = 0
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        total += path.stat().st_size
        say(f"{path.stat().st_size:>10,}  {path.relative_to(out)}")
    trained = (f"{name}: {state['step']} steps in {state['elapsed']:.0f} s" for name, state in states.items() if state)
    say(f"{total:>10,}  {out} ({', '.join(trained)})")


def _write_json(value: Any, path: Path) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def pack(args: argparse.Namespace) -> None:
    """The checkpoint (exported to `--out` before) and what training needs to go on elsewhere, each as a tar file cut
    into parts of at most 15 MiB: `cat NAME.tar.* | tar x -C FOLDER` puts them back."""
    args.to.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        state = torch.load(args.work / f"{part}.pt", map_location="cpu", weights_only=True)
        save(args.to / f"{part}.pt", {name: value for name, value in state.items() if name not in ("own", "optimizer")})
    for name, folder, members in (
        ("demo", args.out, sorted(p for p in args.out.rglob("*") if p.is_file())),
        (
            "train",
            args.work,
            [*args.work.glob("vae.pt"), *(args.to / f"{part}.pt" for part in PARTS)],
        ),
    ):
        whole = args.work / f"{name}.tar"
        with tarfile.open(whole, "w") as archive:
            for path in members:
                archive.add(path, path.name if name == "train" else path.relative_to(folder))
        with whole.open("rb") as file:
            for i, part in enumerate(iter(lambda: file.read(15 << 20), b"")):
                (args.to / f"{name}.tar.{i}").write_bytes(part)
                say(f"{len(part):>10,}  {args.to / f'{name}.tar.{i}'}")
        whole.unlink()


# ---------------------------------------------------------------------------------------------------------------------


LEARNING_RATES = {"vae": 1e-3, "words": 2e-3, "high": 1e-3, "low": 1e-3}
STAGES = {
    "tokenizer": train_tokenizer, "vae": demo_vae.train_vae, "words": train_words, "high": train_expert,
    "low": train_expert, "sheet": sheet, "export": export, "pack": pack,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--work", type=Path, default=Path(".demo-train"), help="folder of states and results")
    parser.add_argument("--minutes", type=float, default=19.0, help="wall-clock bound of this command")
    parser.add_argument(
        "--total-minutes", type=float, help="of the whole stage, over several commands (default: --minutes)"
    )
    parser.add_argument("--lr", type=float, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--no-graph", dest="graph", action="store_false", help="experts: no captured CUDA graph")
    parser.add_argument("--decoder-only", action="store_true", help="vae: sharpen the decoder, leave the latents alone")
    parser.add_argument("--tiny", action="store_true", help="small batches and few scenes: to try a stage out on a CPU")
    parser.add_argument("--log-every", type=float, default=15.0, help="seconds")
    parser.add_argument("--prompts", type=int, default=60, help="evaluation prompts for a sheet")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.5)
    parser.add_argument("--misses", type=int, default=8, help="wrong videos to name")
    parser.add_argument("--out-file", type=Path, help="where `sheet` writes its PNG")
    parser.add_argument("--out", type=Path, default=ROOT / "wan22/demo", help="where `export` writes, `pack` reads")
    parser.add_argument("--to", type=Path, default=Path(".demo-train/packed"), help="where `pack` writes")
    args = parser.parse_args()
    args.lr = args.lr or LEARNING_RATES.get(args.stage)
    args.work.mkdir(parents=True, exist_ok=True)
    STAGES[args.stage](args)


if __name__ == "__main__":
    main()
