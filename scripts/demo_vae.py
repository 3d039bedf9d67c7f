"""The demo's VAE: diffusers' `AutoencoderKLWan`, small, trained on whole sequences at once.

Legend: B batch, C latent channels, T H W latent grid (F = 4 (T - 1) + 1 frames of 8H x 8W pixels).
"""

import argparse
import inspect
import math
import random
import types
from pathlib import Path
from typing import Any

import demo_data
import torch
import torch.nn.functional as F
from demo_training import (
    ROOT,
    Average,
    Bank,
    Clock,
    Size,
    autocast,
    make_bank,
    save,
    say,
    set_up,
    to_frames,
    write_sheet,
)
from torch import Tensor, nn

from wan22.files.tensor_names import vae_name

VAE: dict[str, Any] = {
    "base_dim": 16, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_scales": [],
    "temperal_downsample": [False, True, True],
}  # fmt: skip
# Single frames first, then short clips, then the real thing: (sizes, share of the time).
VAE_PHASES: tuple[tuple[tuple[Size, ...], float], ...] = (
    ((Size(64, 64, 1, 1, 128),), 0.22),
    ((Size(64, 64, 9, 0.8, 48), Size(96, 96, 1, 0.2, 64)), 0.30),
    ((Size(64, 64, 17, 0.45, 40), Size(96, 96, 17, 0.25, 20), Size(128, 128, 33, 0.30, 8)), 0.48),
)
TINY_VAE_PHASES: tuple[tuple[tuple[Size, ...], float], ...] = (
    ((Size(64, 64, 1, 1, 8),), 0.55), ((Size(48, 48, 9, 1, 4),), 0.45),
)  # fmt: skip


def _norm_silu(x: Tensor, gamma: Tensor, front: int) -> Tensor:
    """silu(x / rms over channels * gamma), `front` frames of zeros before it: [B, C, T, H, W] → the same shape."""
    y = x.float()
    y = y * torch.rsqrt(y.square().sum(1, keepdim=True) + 1e-12) * (x.shape[1] ** 0.5 * gamma)
    return F.pad(F.silu(y).to(x.dtype), (0, 0, 0, 0, front, 0))


_fused_norm_silu = _norm_silu


def compile_norms() -> None:
    """The VAE's norms as one kernel each, from now on."""
    global _fused_norm_silu
    _fused_norm_silu = torch.compile(_norm_silu, dynamic=True)


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


def trained_vae(work: Path) -> dict[str, Tensor]:
    """The weights that training left in the work folder, else those of the package's demo, by diffusers' names."""
    if (work / "vae.pt").exists():
        return torch.load(work / "vae.pt", map_location="cpu", weights_only=True)  # type: ignore[no-any-return]
    from safetensors.torch import load_file

    return {vae_name(name): tensor for name, tensor in load_file(ROOT / "wan22/demo/Wan2.1_VAE.safetensors").items()}


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
        compile_norms()
    vae = build_vae(device)
    init_vae(vae)
    if state:
        vae.load_state_dict(state["vae"])
    elif args.decoder_only:
        vae.load_state_dict(trained_vae(args.work))
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
    average.settle()
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

    if not args.decoder_only:  # which leaves the latents as they are: experts were trained on them
        mean, std = measure()
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
