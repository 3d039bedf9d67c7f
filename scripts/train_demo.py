"""Trains the embedded demo: a tokenizer, a video VAE, a text encoder and two small experts, on videos it draws itself.

    python scripts/train_demo.py all --work .demo-train            every stage, about 20 minutes on one H100
    python scripts/train_demo.py tokenizer|vae|experts --minutes N --total-minutes M
    python scripts/train_demo.py sheet|export|pack

Each training stage keeps its state in the work folder and goes on from there. The learning rate follows the share of
`--total-minutes` that has passed, so a stage ends annealed whatever the machine's speed; `--minutes` bounds a command.

Legend: B batch, C latent channels, T H W latent grid (F = 4 (T - 1) + 1 frames of 8H x 8W pixels), M text tokens.
"""

import argparse
import contextlib
import inspect
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import sys
import tarfile
import time
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import demo_data

from wan22.model import TransformerConfig, WanTransformer

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，"
    "背景人很多，倒着走"
)
"""The published negative prompt: the experts learn that it means nothing, as the empty prompt does."""

BOUNDARY = 0.875
TEXT_LEN = 512
TRAINED_LEN = 56
"""Context rows in training. The published model attends to 512, the ones behind the prompt all alike (zeros before the
text embedding): the last of these 56 stands for 457 of them by log(457) = 6.125 on its attention scores, which bfloat16
holds exactly enough. The same function at a ninth of the cost."""

EXPERT: dict[str, Any] = {"dim": 192, "ffn_dim": 640, "num_heads": 6, "num_layers": 6, "freq_dim": 256, "text_dim": 128}
VAE: dict[str, Any] = {
    "base_dim": 16, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_scales": [],
    "temperal_downsample": [False, True, True],
}  # fmt: skip
VOCABULARY = 1400


@dataclass(frozen=True)
class Size:
    """A kind of batch: its clips' size, its share of the steps, clips in it (an expert's) and in the pool behind it."""

    width: int
    height: int
    num_frames: int
    share: float
    batch: int
    pool: int = 0

    @property
    def latent(self) -> tuple[int, int, int]:
        """T, H, W."""
        return (self.num_frames - 1) // 4 + 1, self.height // 8, self.width // 8


# Single frames first, then short clips, then the real thing: (sizes, share of the time).
VAE_PHASES: tuple[tuple[tuple[Size, ...], float], ...] = (
    ((Size(64, 64, 1, 1, 128),), 0.22),
    ((Size(64, 64, 9, 0.8, 48), Size(96, 96, 1, 0.2, 64)), 0.30),
    ((Size(64, 64, 17, 0.45, 40), Size(96, 96, 17, 0.25, 20), Size(128, 128, 33, 0.30, 8)), 0.48),
)
EXPERT_SIZES = (
    Size(128, 128, 33, 0.90, 64, 49152), Size(96, 96, 17, 0.05, 128, 16384), Size(64, 64, 9, 0.05, 256, 16384),
)  # fmt: skip
TINY_VAE_PHASES: tuple[tuple[tuple[Size, ...], float], ...] = (
    ((Size(64, 64, 1, 1, 8),), 0.55), ((Size(48, 48, 9, 1, 4),), 0.45),
)  # fmt: skip
TINY_EXPERT_SIZES = (Size(64, 64, 9, 0.8, 8, 64), Size(96, 96, 17, 0.2, 2, 8))


def say(*words: object) -> None:
    print(*words, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Time and state


class Clock:
    """How much of a stage's time has passed, this command's and earlier ones' together."""

    def __init__(self, minutes: float, total_minutes: float | None, before: float) -> None:
        self.limit, self.before, self.start = 60 * minutes, before, time.monotonic()
        self.total = 60 * (total_minutes if total_minutes is not None else minutes)

    @property
    def here(self) -> float:
        """Seconds since this command began."""
        return time.monotonic() - self.start

    @property
    def elapsed(self) -> float:
        return self.before + self.here

    @property
    def fraction(self) -> float:
        return min(1.0, self.elapsed / self.total)

    @property
    def over(self) -> bool:
        return self.here >= self.limit or self.fraction >= 1

    def learning_rate(self, peak: float, warmup: float = 0.015) -> float:
        """Linear warm-up, then a half cosine to zero at the end of the stage's time."""
        return (
            peak
            * min(1.0, (self.fraction + 1e-4) / warmup, (self.here + 0.1) / 8)
            * 0.5
            * (1 + math.cos(math.pi * self.fraction))
        )


def save(path: Path, state: dict[str, Any]) -> None:
    """Written beside its target, then renamed: a kill leaves the old state."""
    temporary = path.with_suffix(".new")
    torch.save(state, temporary)
    temporary.replace(path)


class Average:
    """Exponential moving average of parameters, float32."""

    def __init__(self, modules: dict[str, nn.Module], decay: float) -> None:
        self.decay, self.steps = decay, 0
        self.source = {f"{key}.{name}": p for key, module in modules.items() for name, p in module.named_parameters()}
        self.value = {name: p.detach().clone() for name, p in self.source.items()}

    @torch.no_grad()
    def update(self) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(list(self.value.values()), [p.detach() for p in self.source.values()], 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The modules hold the average within, and their own weights again after."""
        own = {name: p.detach().clone() for name, p in self.source.items()}
        self._assign(self.value)
        try:
            yield
        finally:
            self._assign(own)

    @torch.no_grad()
    def _assign(self, values: dict[str, Tensor]) -> None:
        for name, p in self.source.items():
            p.copy_(values[name])

    def load(self, values: dict[str, Tensor]) -> None:
        for name, value in self.value.items():
            value.copy_(values[name])


def set_up(args: argparse.Namespace) -> torch.device:
    """Device and the switches that training is fast with. Exactness is for the checkpoint's users, not its training."""
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.manual_seed(args.seed + int(time.time()) % 100000)  # a resumed stage must not repeat its noise
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if device.type == "cuda":
        from torch import _dynamo

        _dynamo.config.suppress_errors = True  # what does not compile runs uncompiled
        _dynamo.config.recompile_limit = 64
    return device


def autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


# ---------------------------------------------------------------------------------------------------------------------
# Scenes and their captions, drawn up once by all processor cores

LABELS = ("colour", "shape", "motion", "size", "speed")
CLASSES = tuple(
    len(v) for v in (demo_data.COLOURS, demo_data.SHAPES, demo_data.MOTIONS, demo_data.SIZES, demo_data.SPEEDS)
)


@dataclass
class Bank:
    """Scenes to draw, packed, and for each several captions as token ids.

    packed float32 [N, P]; ids int16 [N, K, TRAINED_LEN - 1], padded with 0; background int64 [N, K], -100 where the
    caption does not name it.
    """

    packed: Tensor
    ids: Tensor
    background: Tensor

    def labels(self, scenes: Tensor, captions: Tensor) -> Tensor:
        """What the captions say: int64 [B, 11], five attributes of each actor, then the background; -100 for unsaid."""
        actors = self.packed[scenes, 1:].reshape(-1, 2, 15)
        said = torch.where(actors[:, :, :1] > 0, actors[:, :, 2:7], -100.0).long().flatten(1)
        return torch.cat((said, self.background[scenes, captions, None]), dim=1)


def _bank_part(job: tuple[int, int, int, str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A worker's share of a `Bank`: (count, captions a scene, seed, tokenizer file) → numpy arrays."""
    from tokenizers import Tokenizer

    count, captions, seed, tokenizer_file = job
    rng = random.Random(seed)
    torch.set_num_threads(1)
    scenes = [demo_data.sample_scene(rng) for _ in range(count)]
    ids = np.zeros((count, captions, TRAINED_LEN - 1), np.int16)
    background = np.full((count, captions), -100, np.int64)
    if captions:
        tokenizer = Tokenizer.from_file(tokenizer_file)
        for i, scene in enumerate(scenes):
            for k in range(captions):
                while True:  # a caption too long for training is a rare one: another is drawn
                    text, named = demo_data.caption_with_background(scene, rng)
                    tokens = tokenizer.encode(text).ids
                    if len(tokens) < TRAINED_LEN:
                        break
                ids[i, k, : len(tokens)] = tokens
                if named:
                    background[i, k] = demo_data.COLOUR_NAMES.index(scene.background)
    return demo_data.pack(scenes).numpy(), ids, background


def make_bank(count: int, captions: int, seed: int, work: Path, device: torch.device) -> Bank:
    start = time.monotonic()
    processes = max(1, min(16, (os.cpu_count() or 2) - 1))
    jobs = [
        (count // processes, captions, seed * 1000 + i, str(work / "tokenizer/tokenizer.json"))
        for i in range(processes)
    ]
    if processes == 1:
        parts = [_bank_part(job) for job in jobs]
    else:
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            parts = pool.map(_bank_part, jobs)
    packed, ids, background = (
        torch.from_numpy(np.concatenate(arrays)).to(device) for arrays in zip(*parts, strict=True)
    )
    say(f"{len(packed)} scenes with {captions} captions each in {time.monotonic() - start:.1f} s")
    return Bank(packed, ids, background)


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
            *tokenizer.normalizer.normalize_str(NEGATIVE_PROMPT),
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
        "eos_token": "</s>", "extra_special_tokens": {}, "model_max_length": TEXT_LEN, "pad_token": "<pad>",
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
# VAE


def _norm_silu(x: Tensor, gamma: Tensor, front: int) -> Tensor:
    """silu(x / rms over channels * gamma), `front` frames of zeros before it: [B, C, T, H, W] → the same shape."""
    y = x.float()
    y = y * torch.rsqrt(y.square().sum(1, keepdim=True) + 1e-12) * (x.shape[1] ** 0.5 * gamma)
    return F.pad(F.silu(y).to(x.dtype), (0, 0, 0, 0, front, 0))


_fused_norm_silu = _norm_silu


def _causal(conv: Any, x: Tensor, padded: bool = False) -> Tensor:
    """A `WanCausalConv3d` over a whole sequence: zeros for the frames before the first, unless x has them already."""
    across, _, down, _, front, _ = conv._padding
    if front and not padded:
        x = F.pad(x, (0, 0, 0, 0, front, 0))
    return F.conv3d(x, conv.weight, conv.bias, conv.stride, (0, down, across))


def _residual_block(self: Any, x: Tensor, feat_cache: None = None, feat_idx: None = None) -> Tensor:
    y = _causal(self.conv1, _fused_norm_silu(x, self.norm1.gamma, 2), padded=True)
    y = _causal(self.conv2, _fused_norm_silu(y, self.norm2.gamma, 2), padded=True)
    return y + (x if isinstance(self.conv_shortcut, nn.Identity) else _causal(self.conv_shortcut, x))


def _resample(self: Any, x: Tensor, feat_cache: None = None, feat_idx: None = None) -> Tensor:
    """Up or down, in space and time. In time the first frame stands alone: neither halved, nor doubled, nor (going up)
    seen by those after it."""
    if self.mode == "upsample3d" and x.shape[2] > 1:
        b, c, t, h, w = x.shape
        later = _causal(self.time_conv, x[:, :, 1:])
        later = later.view(b, 2, c, t - 1, h, w).permute(0, 2, 3, 1, 4, 5).reshape(b, c, 2 * (t - 1), h, w)
        x = torch.cat((x[:, :, :1], later), dim=2)
    b, t = x.shape[0], x.shape[2]
    frames = x.transpose(1, 2).flatten(0, 1)  # [B*T, C, H, W]
    if self.mode.startswith("upsample"):
        frames = self.resample[1](F.interpolate(frames, scale_factor=2.0, mode="nearest-exact"))
    else:
        frames = self.resample(frames)
    x = frames.unflatten(0, (b, t)).transpose(1, 2)
    if self.mode == "downsample3d" and t > 1:
        x = torch.cat(
            (x[:, :, :1], F.conv3d(x, self.time_conv.weight, self.time_conv.bias, self.time_conv.stride)), dim=2
        )
    return x


class WholeSequence:
    """The VAE over whole sequences, under autograd: the same function as diffusers' loop over chunks with caches, in a
    tenth of the kernel launches. It changes how the given model computes, not its parameters or their names."""

    def __init__(self, vae: Any, channels_last: bool = False) -> None:
        from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, WanResidualBlock

        self.vae, self.channels_last = vae, channels_last
        for module in vae.modules():
            if isinstance(module, WanResidualBlock):
                setattr(module, "forward", types.MethodType(_residual_block, module))  # noqa: B010
            elif isinstance(module, WanResample):
                setattr(module, "forward", types.MethodType(_resample, module))  # noqa: B010
        layouts = {4: torch.channels_last, 5: torch.channels_last_3d} if channels_last else {}
        for parameter in vae.parameters():
            parameter.data = parameter.data.contiguous(
                memory_format=layouts.get(parameter.ndim, torch.contiguous_format)
            )

    def encode(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """video [B, 3, F, H, W] in [-1, 1] → mean and log variance of the latents, each [B, C, T, H/8, W/8]."""
        if self.channels_last:
            video = video.contiguous(memory_format=torch.channels_last_3d)
        mean, log_variance = _causal(self.vae.quant_conv, self.vae.encoder(video)).float().chunk(2, dim=1)
        return mean, log_variance

    def decode(self, latents: Tensor) -> Tensor:
        """latents [B, C, T, H, W] → video [B, 3, F, 8H, 8W], not clamped."""
        if self.channels_last:
            latents = latents.contiguous(memory_format=torch.channels_last_3d)
        return self.vae.decoder(_causal(self.vae.post_quant_conv, latents)).float()


def build_vae(device: torch.device) -> Any:
    from diffusers import AutoencoderKLWan

    vae: Any = AutoencoderKLWan(**VAE)
    return vae.to(device)


@torch.no_grad()
def init_vae(vae: Any) -> None:
    """A start that learns from the first step, single frames first. With PyTorch's own (small weights, biases as large)
    the shapes stay invisible for thousands of steps.

    Residual branches begin as nothing; convolutions see the current frame only, so that what single frames teach holds
    for videos too; going down in time keeps every second frame, going up doubles it."""
    for name, parameter in vae.named_parameters():
        if name.endswith("time_conv.weight"):  # [C or 2C, C, 3, 1, 1]
            parameter.zero_()
            channels = parameter.shape[1]
            for half in parameter[:, :, -1, 0, 0].split(channels):
                half.copy_(torch.eye(channels))
        elif name.endswith(("conv2.weight", "proj.weight", "bias")):
            parameter.zero_()
        elif parameter.ndim >= 4:
            taps = parameter.shape[2] if parameter.ndim == 5 else 1
            nn.init.normal_(parameter, std=(parameter[0].numel() / taps) ** -0.5)
            if taps > 1:
                parameter[:, :, :-1] = 0
    vae.quant_conv.bias[16:] = -8.0  # and little noise on the latents


def published_statistics(device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """The published mean and standard deviation of the latents, each [1, C, 1, 1, 1]."""
    from diffusers import AutoencoderKLWan

    parameters = inspect.signature(AutoencoderKLWan.__init__).parameters
    mean, std = (torch.tensor(parameters[f"latents_{name}"].default, device=device) for name in ("mean", "std"))
    return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)


def vae_loss(whole: WholeSequence, video: Tensor) -> tuple[Tensor, Tensor]:
    """Loss, and the mean absolute error in it. What differs from the background counts fivefold: it is a tenth of the
    picture. The latents are blurred a little: what the experts make will not be exact either."""
    mean, log_variance = whole.encode(video)
    log_variance = log_variance.clamp(-20, 5)
    spread = mean.detach().std(dim=(0, 2, 3, 4), keepdim=True)
    share = 0.05 * torch.rand(len(video), 1, 1, 1, 1, device=video.device)
    noise = (log_variance.exp() + (share * spread).square()).sqrt() * torch.randn_like(mean)
    error = whole.decode(mean + noise) - video
    foreground = (video - video[..., :1, :1, :1]).abs().amax(1, keepdim=True) > 0.1
    absolute = error.abs()
    edges = sum(error.diff(dim=dim).abs().mean() for dim in (2, 3, 4) if error.shape[dim] > 1)
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    loss = ((absolute + error.square()) * (1 + 4 * foreground)).mean() + 0.5 * edges + 1e-5 * divergence
    return loss, absolute.mean().detach()


def train_vae(args: argparse.Namespace) -> None:
    device, path = set_up(args), args.work / "vae-state.pt"
    state = torch.load(path, map_location=device, weights_only=True) if path.exists() else {}
    clock = Clock(args.minutes, args.total_minutes, state.get("elapsed", 0.0))
    phases = TINY_VAE_PHASES if args.tiny else VAE_PHASES
    if args.decoder_only:
        phases = ((phases[-1][0], 1.0),)
    bank = make_bank(200 if args.tiny else 60000, 0, 1 + int(clock.before), args.work, device)
    if device.type == "cuda" and args.compile:
        global _fused_norm_silu
        _fused_norm_silu = torch.compile(_norm_silu, dynamic=True)
    vae = build_vae(device)
    init_vae(vae)
    if state:
        vae.load_state_dict(state["vae"])
    elif (args.work / "vae.pt").exists():
        vae.load_state_dict(torch.load(args.work / "vae.pt", map_location=device, weights_only=True))
    whole = WholeSequence(vae, channels_last=device.type == "cuda")  # a third faster there
    if args.decoder_only:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    trained = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-4)
    average = Average({"vae": vae}, 0.998)
    if state:
        optimizer.load_state_dict(state["optimizer"])
        average.load(state["average"])
    step, total, count, reported, saved = state.get("step", 0), torch.zeros((), device=device), 0, 0.0, clock.here
    order = random.Random(step)
    while not clock.over:
        sizes = phases[-1][0]
        until = 0.0
        for phase, share in phases:
            until += share
            if clock.fraction < until:
                sizes = phase
                break
        size = order.choices(sizes, [s.share for s in sizes])[0]
        chosen = torch.randint(len(bank.packed), (size.batch,), device=device)
        video = demo_data.draw_packed(bank.packed[chosen], size.width, size.height, size.num_frames)
        with autocast(device):
            loss, absolute = vae_loss(whole, video)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.param_groups[0]["lr"] = clock.learning_rate(args.lr)
        optimizer.step()
        average.update()
        step, count, total = step + 1, count + 1, total + absolute
        if clock.here - reported > args.log_every:
            say(f"vae {clock.elapsed:5.0f} s  step {step}  {count / (clock.here - reported):.2f} steps/s  "
                f"L1 {total.item() / count:.4f}")  # fmt: skip
            total, count, reported = torch.zeros((), device=device), 0, clock.here
        if clock.here - saved > 120:
            save(path, _vae_state(vae, optimizer, average, step, clock))
            saved = clock.here
    save(path, _vae_state(vae, optimizer, average, step, clock))
    average._assign(average.value)
    finish_vae(vae, whole, bank, args, device)


def _vae_state(vae: Any, optimizer: Any, average: Average, step: int, clock: Clock) -> dict[str, Any]:
    return {"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "average": average.value, "step": step,
            "elapsed": clock.elapsed}  # fmt: skip


@torch.no_grad()
def finish_vae(vae: Any, whole: WholeSequence, bank: Bank, args: argparse.Namespace, device: torch.device) -> None:
    """Rounds the weights to bf16 and gives the latents the published mean and spread, channel by channel, by folding an
    affine map into the encoder's last product and its inverse into the decoder's first; writes `vae.pt`."""
    for parameter in vae.parameters():
        parameter.copy_(parameter.bfloat16())
    size = Size(64, 64, 9, 1, 4) if args.tiny else Size(128, 128, 33, 1, 16)
    target_mean, target_std = (x.flatten() for x in published_statistics(device))

    def measure() -> tuple[Tensor, Tensor]:
        latents = []
        for i in range(4 if args.tiny else 32):
            packed = bank.packed[i * size.batch : (i + 1) * size.batch]
            latents.append(whole.encode(demo_data.draw_packed(packed, size.width, size.height, size.num_frames))[0])
        values = torch.cat(latents).double().transpose(0, 1).flatten(1)
        return values.mean(1).float(), values.std(1).float()

    mean, std = measure()
    if args.decoder_only:  # the latents are what experts were trained on: they stay
        target_mean, target_std = mean, std
    gain = target_std / std
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:16] *= gain.view(-1, 1, 1, 1, 1)
    quant.bias[:16] = (quant.bias[:16] - mean) * gain + target_mean
    quant.bias[16:] += 2 * gain.log()
    post.bias += post.weight.flatten(1) @ (mean - target_mean / gain)
    post.weight /= gain.view(1, -1, 1, 1, 1)
    for parameter in (*quant.parameters(), *post.parameters()):
        parameter.copy_(parameter.bfloat16())
    mean, std = measure()
    save(args.work / "vae.pt", {name: value.bfloat16().cpu() for name, value in vae.state_dict().items()})

    # The judge is diffusers' own loop over chunks, on scenes not trained on.
    judge = build_vae(device)
    judge.load_state_dict(vae.state_dict())
    rng = random.Random(99)
    scenes = [demo_data.sample_scene(rng, held_out=True) for _ in range(size.batch)]
    video = demo_data.draw(scenes, size.width, size.height, size.num_frames, device)
    latents = judge.encode(video).latent_dist.mode()
    decoded = judge.decode(latents).sample
    error = (decoded - video).square().mean().item()
    same = (whole.decode(latents).clamp(-1, 1) - decoded).abs().max().item()
    say(f"vae: PSNR {10 * math.log10(4 / error):.2f} dB, L1 {(decoded - video).abs().mean().item():.4f}; latents off "
        f"the published mean by {(mean - target_mean).abs().max().item():.4f} at most, their spread by "
        f"{(std / target_std - 1).abs().max().item():.4f}; whole sequence against chunks {same:.1e}")  # fmt: skip
    rows = torch.stack((video[:6], decoded[:6]), dim=1).flatten(0, 1)
    write_sheet(to_frames(rows), args.work / "vae.png")


# ---------------------------------------------------------------------------------------------------------------------
# Text encoder and experts


def build_text_encoder(vocabulary: int) -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    sizes: Any = UMT5Config
    config = sizes(
        vocab_size=vocabulary, d_model=EXPERT["text_dim"], d_kv=32, d_ff=256, num_layers=3, num_heads=4,
        dropout_rate=0.0, feed_forward_proj="gated-gelu", relative_attention_num_buckets=32, pad_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
    )  # fmt: skip
    return UMT5EncoderModel(config)


def attend_padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Cross-attention where the last of TRAINED_LEN rows stands for all the rows up to TEXT_LEN: they are alike."""
    bias = torch.zeros(k.shape[1], dtype=q.dtype, device=q.device)
    bias[-1] = math.log(TEXT_LEN - TRAINED_LEN + 1)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    bias = bias.expand(q.shape[0], q.shape[1], q.shape[2], -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)


def build_expert() -> WanTransformer:
    expert: Any = WanTransformer(TransformerConfig(**EXPERT, text_len=TRAINED_LEN))
    expert.init_weights()
    for layer in (expert.text_embedding[0], expert.text_embedding[2]):
        nn.init.xavier_uniform_(layer.weight)  # the published 0.02 is for a wider layer, and slow to grow here
    for block in expert.blocks:
        block.cross_attn.attend = attend_padded
    return expert


def keep_float32(expert: Any) -> None:
    """Takes out of autocast what the model computes in float32 when it is used."""
    for module in (expert.patch_embedding, expert.time_embedding, expert.time_projection, expert.head):
        module.forward = torch.autocast("cuda", enabled=False)(module.forward)


class Heads(nn.Module):
    """Reads off the text encoder's rows what a caption says. Only for training, so that the language is learned soon:
    every attribute has its own attention over the rows and its own product."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.classes = (*CLASSES, *CLASSES, len(demo_data.COLOURS))
        self.query = nn.Parameter(torch.randn(len(self.classes), width) * width**-0.5)
        self.out = nn.ModuleList(nn.Linear(width, n) for n in self.classes)

    def forward(self, rows: Tensor, mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """rows [B, M, E], mask [B, M], labels [B, 11] → cross entropy, and the share of right answers."""
        weights = torch.einsum("bme,ae->bam", rows, self.query).masked_fill(~mask[:, None], -1e4).softmax(-1)
        pooled = weights @ rows  # [B, 11, E]
        loss, right, known = rows.new_zeros(()), rows.new_zeros(()), rows.new_zeros(())
        for i, layer in enumerate(self.out):
            logits, target = layer(pooled[:, i]), labels[:, i]
            loss = loss + F.cross_entropy(logits, target, ignore_index=-100, reduction="sum") / len(labels)
            right = right + (logits.argmax(-1) == target).sum()
            known = known + (target >= 0).sum()
        return loss, (right / known.clamp(min=1)).detach()


class Models:
    """All that generates: text encoder, two experts and the VAE, on one device."""

    def __init__(self, work: Path, device: torch.device) -> None:
        from tokenizers import Tokenizer

        self.device = device
        self.tokenizer = Tokenizer.from_file(str(work / "tokenizer/tokenizer.json"))
        self.text_encoder = build_text_encoder(self.tokenizer.get_vocab_size()).to(device)
        self.high, self.low = build_expert().to(device), build_expert().to(device)
        self.heads = Heads(EXPERT["text_dim"]).to(device)
        self.vae = build_vae(device)
        self.vae.load_state_dict(torch.load(work / "vae.pt", map_location=device, weights_only=True))
        self.vae.requires_grad_(False)
        self.whole = WholeSequence(self.vae, channels_last=device.type == "cuda")
        self.mean, self.std = published_statistics(device)
        if device.type == "cuda":
            keep_float32(self.high)
            keep_float32(self.low)

    @property
    def trained(self) -> dict[str, nn.Module]:
        return {"text_encoder": self.text_encoder, "high": self.high, "low": self.low, "heads": self.heads}

    def load(self, work: Path) -> dict[str, Any]:
        """The last state: everything where training stopped on this machine, else the average that `pack` took."""
        full, average = work / "experts-state.pt", work / "experts-average.pt"
        if not full.exists() and not average.exists():
            return {}
        state = torch.load(full if full.exists() else average, map_location=self.device, weights_only=True)
        for key, module in self.trained.items():
            source = state["own"] if "own" in state else state["average"]
            for name, parameter in module.named_parameters():
                parameter.data.copy_(source[f"{key}.{name}"])
        return state

    def context(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids [B, M], padded with 0 → context rows [B, M, E], zero where padded; and the mask [B, M]."""
        mask = ids != 0
        rows = self.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        return rows * mask[..., None], mask

    def encode(self, packed: Tensor, size: Size) -> Tensor:
        """Draws scenes and encodes them: normalised latents, float32 [B, C, T, H, W]."""
        with torch.no_grad(), autocast(self.device):
            video = demo_data.draw_packed(packed, size.width, size.height, size.num_frames)
            return (self.whole.encode(video)[0] - self.mean) / self.std

    @torch.no_grad()
    def generate(
        self,
        prompts: list[str],
        size: Size,
        *,
        steps: int = 20,
        shift: float = 6.0,
        guidance: float = 3.5,
        seed: int = 0,
    ) -> Tensor:
        """Prompts → video [B, 3, F, H, W] in [-1, 1], by Euler's method."""
        encoded = [self.tokenizer.encode(prompt).ids[: TRAINED_LEN - 1] for prompt in [*prompts, ""]]
        ids = torch.zeros(len(encoded), TRAINED_LEN - 1, dtype=torch.long)
        for row, tokens in zip(ids, encoded, strict=True):
            row[: len(tokens)] = torch.tensor(tokens)
        rows = self.context(ids.to(self.device))[0]
        rows = torch.cat((rows[:-1], rows[-1:].expand(len(prompts), -1, -1)))  # prompted, then not
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(len(prompts), 16, *size.latent, generator=generator).to(self.device)
        u = torch.linspace(0.999, 0, steps + 1)
        sigmas = (shift * u / (1 + (shift - 1) * u)).tolist()
        with autocast(self.device):
            contexts = {expert: expert.embed_context(rows) for expert in (self.high, self.low)}
            for sigma, after in itertools.pairwise(sigmas):
                expert = self.high if sigma >= BOUNDARY else self.low
                timestep = torch.full((2 * len(x),), 1000 * sigma, device=self.device)
                velocity, plain = expert(torch.cat((x, x)), timestep, contexts[expert]).float().chunk(2)
                x = x + (after - sigma) * (plain + guidance * (velocity - plain))
        latents = x * self.std + self.mean
        return torch.cat([self.whole.decode(part) for part in latents.split(8)]).clamp(-1, 1)


class Pool:
    """Encoded clips of one size, ever more of them and then ever newer: a ring in the device's memory."""

    def __init__(self, models: Models, bank: Bank, size: Size) -> None:
        self.models, self.bank, self.size, self.made = models, bank, size, 0
        self.latents = torch.zeros(size.pool, 16, *size.latent, dtype=torch.float16, device=models.device)
        self.scenes = torch.zeros(size.pool, dtype=torch.long, device=models.device)

    def add(self, count: int, offset: int) -> None:
        count = min(count, self.size.pool)
        scenes = (torch.arange(count, device=self.models.device) + self.made + offset) % len(self.bank.packed)
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
    edge = BOUNDARY / (shift - (shift - 1) * BOUNDARY)  # where the shifted level crosses the boundary
    u = torch.rand(count, device=device)
    u = edge + u * (1 - edge) if high else u * edge
    return shift * u / (1 + (shift - 1) * u)


def nothing_ids(models: Models, bank: Bank) -> Tensor:
    """Token ids of what is to mean nothing, int64 [K, M]: the empty prompt, or (1 in 4) a piece of the negative one."""
    tokens = models.tokenizer.encode(NEGATIVE_PROMPT).ids[:-1]
    width, rng = bank.ids.shape[2], random.Random(0)
    table = torch.zeros(64, width, dtype=torch.long)
    table[:, 0] = 1
    for row in table[48:]:
        length = rng.randint(20, width - 1)
        start = rng.randint(0, max(0, len(tokens) - length))
        piece = [*tokens[start : start + length], 1]
        row[: len(piece)] = torch.tensor(piece)
    return table.to(models.device)


def train_experts(args: argparse.Namespace) -> None:
    device = set_up(args)
    start = time.monotonic()
    sizes = TINY_EXPERT_SIZES if args.tiny else EXPERT_SIZES
    models = Models(args.work, device)
    state = models.load(args.work)
    clock = Clock(args.minutes, args.total_minutes, state.get("elapsed", 0.0))
    clock.start = start  # the making of the bank counts
    bank = make_bank(400 if args.tiny else 100000, 3, 7, args.work, device)
    blank = nothing_ids(models, bank)
    if device.type == "cuda" and args.compile:
        global _fused_norm_silu
        _fused_norm_silu = torch.compile(_norm_silu, dynamic=True)
        for block in (*models.high.blocks, *models.low.blocks):
            block.compile(dynamic=False)

    parameters = [p for module in models.trained.values() for p in module.parameters()]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim >= 2]},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=device.type == "cuda")
    average = Average(models.trained, 0.999)
    if state:
        average.load(state["average"])
        average.steps = state["step"]
        if "optimizer" in state:
            optimizer.load_state_dict(state["optimizer"])
    step = state.get("step", 0)
    order = random.Random(step)
    offset = order.randrange(len(bank.packed))  # a resumed stage goes on with other scenes

    pools = [Pool(models, bank, size) for size in sizes]
    burst = 4 if args.tiny else 64
    for pool in pools:
        for _ in range(4 if args.tiny else 24):
            pool.add(burst, offset)
    _wait(device)
    began = clock.here
    for _ in range(1 if args.tiny else 4):
        pools[0].add(burst, offset)
    _wait(device)
    burst_seconds = (clock.here - began) / (1 if args.tiny else 4)
    say(f"ready after {clock.here:.0f} s; {1000 * burst_seconds / burst:.2f} ms to draw and encode a clip; "
        f"{sum(p.numel() for p in models.high.parameters()) / 1e6:.2f} M parameters an expert, "
        f"{sum(p.numel() for p in models.text_encoder.parameters()) / 1e6:.2f} M in the text encoder")  # fmt: skip

    sums, count, reported, saved, looked, pause = (
        torch.zeros(4, device=device),
        0,
        clock.here,
        clock.here,
        clock.here,
        8,
    )
    while not clock.over:
        pool = order.choices(pools, [s.share for s in sizes])[0]
        loss, numbers = experts_loss(models, bank, pool, blank, compiled=pool is pools[0])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for module in models.trained.values():
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = clock.learning_rate(args.lr)
        optimizer.step()
        average.update()
        sums, step, count = sums + numbers, step + 1, count + 1
        if step % pause == 0:
            pools[0].add(burst, offset)
        if step % (8 * pause) == 0:
            for pool in pools[1:]:
                pool.add(burst, offset)
        if clock.here - reported > args.log_every:
            high, low, words, right = (sums / count).tolist()
            seconds = clock.here - reported
            say(f"experts {clock.elapsed:5.0f} s  step {step}  {count / seconds:.1f} steps/s  "
                f"high {high:.4f}  low {low:.4f}  words {words:.3f} ({100 * right:.1f} % right)  "
                f"clips {[p.made for p in pools]}  lr {optimizer.param_groups[0]['lr']:.1e}")  # fmt: skip
            # A fifth of the time goes into new clips.
            pause = max(1, round(4 * burst_seconds / max(seconds / count - burst_seconds / pause, 1e-4)))
            sums, count, reported = torch.zeros(4, device=device), 0, clock.here
        if clock.here - saved > 150:
            save(args.work / "experts-state.pt", _experts_state(models, optimizer, average, step, clock))
            saved = clock.here
        if args.eval_every_minutes and clock.here - looked > 60 * args.eval_every_minutes:
            with average.applied():
                judge(models, sizes[0], args.prompts, args, args.work / f"sheet-{step}.png")
            looked = reported = clock.here
            sums, count = torch.zeros(4, device=device), 0
    save(args.work / "experts-state.pt", _experts_state(models, optimizer, average, step, clock))
    save(args.work / "experts-average.pt", {"average": average.value, "step": step, "elapsed": clock.elapsed})
    say(f"experts: {step} steps, {clock.elapsed:.0f} s of {clock.total:.0f} s")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _experts_state(models: Models, optimizer: Any, average: Average, step: int, clock: Clock) -> dict[str, Any]:
    own = {
        f"{key}.{name}": p.detach() for key, module in models.trained.items() for name, p in module.named_parameters()
    }
    return {
        "own": own,
        "average": average.value,
        "optimizer": optimizer.state_dict(),
        "step": step,
        "elapsed": clock.elapsed,
    }


def experts_loss(models: Models, bank: Bank, pool: Pool, blank: Tensor, compiled: bool) -> tuple[Tensor, Tensor]:
    """One step's loss over both experts (each on its own clips, of its own side of the boundary) and the words; and its
    parts to report: loss of the high-noise expert, of the low-noise one, of the words, share of words right."""
    device, batch = models.device, pool.size.batch
    clean, scenes = pool.draw(2 * batch)  # the high-noise expert's, then the low-noise one's
    captions = torch.randint(bank.ids.shape[1], (2 * batch,), device=device)
    ids = bank.ids[scenes, captions].long()
    labels = bank.labels(scenes, captions)
    dropped = torch.rand(2 * batch, device=device) < 0.13
    empty = blank[torch.randint(len(blank), (2 * batch,), device=device)]
    rows, mask = models.context(torch.where(dropped[:, None], empty, ids))
    words, right = models.heads(rows, mask, torch.where(dropped[:, None], -100, labels))

    sigma = torch.cat((draw_sigmas(batch, True, device), draw_sigmas(batch, False, device)))
    noise = torch.randn_like(clean)
    level = sigma.view(-1, 1, 1, 1, 1)
    noisy, target = (1 - level) * clean + level * noise, noise - clean
    losses = []
    stance = contextlib.nullcontext() if compiled or device.type != "cuda" else torch.compiler.set_stance("force_eager")
    with autocast(device), stance:
        for expert, part in ((models.high, slice(0, batch)), (models.low, slice(batch, None))):
            velocity = expert(noisy[part], 1000 * sigma[part], expert.embed_context(rows[part]))
            losses.append(F.mse_loss(velocity.float(), target[part]))
    total = losses[0] + losses[1] + 0.1 * words
    return total, torch.stack((losses[0], losses[1], words, right)).detach()


# ---------------------------------------------------------------------------------------------------------------------
# Looking and judging


def to_frames(video: Tensor) -> np.ndarray:
    """[B, 3, F, H, W] in [-1, 1] → uint8 [B, F, H, W, 3]."""
    return ((video.permute(0, 2, 3, 4, 1) + 1) * 127.5).round().clamp(0, 255).byte().cpu().numpy()


def write_sheet(frames: np.ndarray, path: Path, columns: int = 8) -> None:
    """A PNG with a row a video, `columns` frames each: uint8 [B, F, H, W, 3]."""
    from PIL import Image

    chosen = frames[:, np.linspace(0, frames.shape[1] - 1, columns).round().astype(int)]
    chosen = np.pad(chosen, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)
    rows = [np.concatenate(list(row), axis=1) for row in chosen]
    Image.fromarray(np.concatenate(rows, axis=0)).save(path, optimize=True)


def judge(models: Models, size: Size, count: int, args: argparse.Namespace, path: Path) -> None:
    """Generates `count` evaluation prompts, lets the detector say what they show, draws a sheet of the first 20."""
    from detector import detect

    start = time.monotonic()
    prompts = demo_data.evaluation_prompts(count)
    stance = torch.compiler.set_stance("force_eager") if models.device.type == "cuda" else contextlib.nullcontext()
    with stance:
        parts = [
            models.generate([p for p, _ in prompts[i : i + 20]], size, steps=args.steps, guidance=args.guidance, seed=i)
            for i in range(0, count, 20)
        ]
    frames = to_frames(torch.cat(parts))
    right, misses = dict.fromkeys(("colour", "shape", "motion"), 0), []
    for i, ((prompt, scene), video) in enumerate(zip(prompts, frames, strict=True)):
        seen = detect(video)
        wrong = []
        for name in right:
            good = getattr(seen, name) == getattr(scene.actors[0], name)
            right[name] += good
            wrong += [] if good else [f"{name} {getattr(seen, name)}"]
        if wrong:
            misses.append(f"{i}: {prompt!r}: {', '.join(wrong)}")
    write_sheet(frames[:20], path)
    say(f"sheet {path.name}: " + ", ".join(f"{name} {n}/{count}" for name, n in right.items())
        + f" ({time.monotonic() - start:.0f} s)")  # fmt: skip
    for miss in misses[: args.misses]:
        say("   " + miss)


def sheet(args: argparse.Namespace) -> None:
    device = set_up(args)
    models = Models(args.work, device)
    state = models.load(args.work)
    average = Average(models.trained, 0.999)
    average.load(state["average"])
    size = TINY_EXPERT_SIZES[0] if args.tiny else EXPERT_SIZES[0]
    with average.applied():
        judge(models, size, args.prompts, args, args.out_file or args.work / "sheet.png")


# ---------------------------------------------------------------------------------------------------------------------
# Export

PUBLISHED_TEXT = {
    r"shared\.weight": "token_embedding.weight",
    r"encoder\.final_layer_norm\.weight": "norm.weight",
    r"encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.([qkvo])\.weight": r"blocks.\1.attn.\2.weight",
    r"encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.relative_attention_bias\.weight": (
        r"blocks.\1.pos_embedding.embedding.weight"
    ),
    r"encoder\.block\.(\d+)\.layer\.0\.layer_norm\.weight": r"blocks.\1.norm1.weight",
    r"encoder\.block\.(\d+)\.layer\.1\.layer_norm\.weight": r"blocks.\1.norm2.weight",
    r"encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wi_0\.weight": r"blocks.\1.ffn.gate.0.weight",
    r"encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wi_1\.weight": r"blocks.\1.ffn.fc1.weight",
    r"encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wo\.weight": r"blocks.\1.ffn.fc2.weight",
}
"""transformers' names → published ones."""

_PARTS = {
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}


def published_vae_name(name: str) -> str:
    """diffusers' name of a parameter of the VAE → the published one."""
    name = re.sub(r"^quant_conv", "conv1", name)
    name = re.sub(r"^post_quant_conv", "conv2", name)
    name = re.sub(r"^(encoder|decoder)\.conv_in", r"\1.conv1", name)
    name = name.replace("norm_out", "head.0").replace("conv_out", "head.2")
    name = re.sub(r"mid_block\.attentions\.0", "middle.1", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"middle.{2 * int(m[1])}", name)
    name = name.replace("down_blocks", "downsamples")
    name = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"upsamples.{4 * int(m[1]) + int(m[2])}", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"upsamples.{4 * int(m[1]) + 3}", name)
    if re.search(r"(middle|downsamples|upsamples)\.", name):
        name = re.sub(r"\.(norm1|conv1|norm2|conv2|conv_shortcut)\.", lambda m: f".{_PARTS[m[1]]}.", name)
    return name


def published_text_name(name: str) -> str:
    for pattern, published in PUBLISHED_TEXT.items():
        if match := re.fullmatch(pattern, name):
            return match.expand(published)
    raise KeyError(name)


def export(args: argparse.Namespace) -> None:
    """Writes the checkpoint in the published layout, bf16. The same weights give the same bytes."""
    from safetensors.torch import save_file

    models = Models(args.work, torch.device("cpu"))
    state = models.load(args.work)
    average = Average(models.trained, 0.999)
    average.load(state["average"])
    average._assign(average.value)

    def write(tensors: dict[str, Tensor], path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        contiguous = {name: tensors[name].detach().bfloat16().contiguous() for name in sorted(tensors)}
        save_file(contiguous, path, metadata={"format": "pt"})

    out = args.out
    sizes = {"_class_name": "WanModel", "_diffusers_version": "0.33.0", "model_type": "t2v", "eps": 1e-6}
    config = sizes | EXPERT | {"in_dim": 16, "out_dim": 16, "text_len": TEXT_LEN}
    for name, expert in (("high_noise_model", models.high), ("low_noise_model", models.low)):
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
    text = {published_text_name(name): p for name, p in models.text_encoder.named_parameters()}
    write(text, out / "models_t5_umt5-xxl-enc-bf16.safetensors")
    write({published_vae_name(n): p for n, p in models.vae.named_parameters()}, out / "Wan2.1_VAE.safetensors")
    _write_json({"framework": "Pytorch", "task": "text-to-video"}, out / "configuration.json")
    folder = out / "google/umt5-xxl"
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((args.work / "tokenizer" / file).read_bytes())
    total = 0
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        total += path.stat().st_size
        say(f"{path.stat().st_size:>10,}  {path.relative_to(out)}")
    say(f"{total:>10,}  {out} ({state['step']} steps, {state['elapsed']:.0f} s)")


def _write_json(value: Any, path: Path) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def pack(args: argparse.Namespace) -> None:
    """The checkpoint (exported to `--out` before) and what training needs to go on elsewhere, each as a tar file cut
    into parts of at most 15 MiB: `cat NAME.tar.* | tar x -C FOLDER` puts them back."""
    args.to.mkdir(parents=True, exist_ok=True)
    for name, folder, members in (
        ("demo", args.out, sorted(p for p in args.out.rglob("*") if p.is_file())),
        (
            "train",
            args.work,
            [args.work / "experts-average.pt", args.work / "vae.pt", *sorted((args.work / "tokenizer").iterdir())],
        ),
    ):
        whole = args.work / f"{name}.tar"
        with tarfile.open(whole, "w") as archive:
            for path in members:
                archive.add(path, path.relative_to(folder))
        with whole.open("rb") as file:
            for i, part in enumerate(iter(lambda: file.read(15 << 20), b"")):
                (args.to / f"{name}.tar.{i}").write_bytes(part)
                say(f"{len(part):>10,}  {args.to / f'{name}.tar.{i}'}")
        whole.unlink()


# ---------------------------------------------------------------------------------------------------------------------


def everything(args: argparse.Namespace) -> None:
    shares = {"vae": 0.36, "experts": 0.64}
    train_tokenizer(args)
    for stage, run in (("vae", train_vae), ("experts", train_experts)):
        values = vars(args) | {"minutes": args.minutes * shares[stage], "total_minutes": args.minutes * shares[stage]}
        run(argparse.Namespace(**values | {"lr": LEARNING_RATES[stage]}))
    sheet(args)
    export(args)


LEARNING_RATES = {"vae": 1e-3, "experts": 1e-3}
STAGES = {
    "tokenizer": train_tokenizer, "vae": train_vae, "experts": train_experts, "sheet": sheet, "export": export,
    "pack": pack, "all": everything,
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
    parser.add_argument("--decoder-only", action="store_true", help="vae: sharpen the decoder, leave the latents alone")
    parser.add_argument("--tiny", action="store_true", help="small batches and few scenes: to try a stage out on a CPU")
    parser.add_argument("--log-every", type=float, default=15.0, help="seconds")
    parser.add_argument(
        "--eval-every-minutes", type=float, default=0.0, help="a sheet now and then while experts train"
    )
    parser.add_argument("--prompts", type=int, default=60, help="evaluation prompts for a sheet")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.5)
    parser.add_argument("--misses", type=int, default=8, help="wrong videos to name")
    parser.add_argument("--out-file", type=Path, help="where `sheet` writes its PNG")
    parser.add_argument("--out", type=Path, default=ROOT / "wan22/demo", help="where `export` writes, `pack` reads")
    parser.add_argument("--to", type=Path, default=Path(".demo-train/packed"), help="where `pack` writes")
    args = parser.parse_args()
    args.lr = args.lr or LEARNING_RATES.get(args.stage, 1e-3)
    args.work.mkdir(parents=True, exist_ok=True)
    STAGES[args.stage](args)


if __name__ == "__main__":
    main()
