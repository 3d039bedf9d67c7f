"""Latents → frames, through diffusers' Wan VAE, decoded as a stream over time.

Legend: C latent channels, T H W latent grid, F pixel frames: 1 for the first latent frame, 4 for each that follows.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from wan22.checkpoint import Checkpoint, vae_name
from wan22.config import RequestError
from wan22.tensor_files import check_names


class VideoVAE:
    """The checkpoint's VAE in float32, as published; PyTorch's own default for convolutions (TF32 on a GPU)."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        """Reads the weights. Raises RequestError for foreign files."""
        self.model = _empty(checkpoint)
        names = {published: vae_name(published) for published in checkpoint.vae.shapes}
        meta = self.model.state_dict()
        state = {name: torch.empty(meta[name].shape, dtype=torch.float32, device=device) for name in names.values()}
        checkpoint.vae.read({published: state[name] for published, name in names.items()})
        self.model.load_state_dict(state, strict=True, assign=True)
        self.model.requires_grad_(False).eval()
        config = self.model.config
        self.mean = torch.tensor(config.latents_mean, device=device).view(1, -1, 1, 1, 1)
        # The published code keeps 1 / std in float32 and divides by it; z · std would differ in the last bit.
        self.inverse_std = 1.0 / torch.tensor(config.latents_std, device=device).view(1, -1, 1, 1, 1)

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Iterator[Tensor]:
        """latents [C, T, H, W] float32, normalized → chunks [F, 3, 8H, 8W] float32 in -1…1: of 1 frame, then 4 each.

        The VAE is causal in time and keeps the last two frames of every convolution's input, so the chunks of a
        stream equal those of the whole.
        """
        z = latents.to(self.mean)[None] / self.inverse_std + self.mean
        model = self.model
        model.clear_cache()
        try:
            z = model.post_quant_conv(z)
            for t in range(z.shape[2]):
                model._conv_idx = [0]
                chunk = model.decoder(
                    z[:, :, t : t + 1], feat_cache=model._feat_map, feat_idx=model._conv_idx, first_chunk=t == 0
                )
                yield chunk[0].clamp(-1, 1).transpose(0, 1)  # F 3 8H 8W
        finally:
            model.clear_cache()

    @torch.inference_mode()
    def encode(self, frames: Tensor) -> Tensor:
        """frames [3, F, H, W] float32 in -1…1, F of the form 4n + 1 → normalized latents [C, T, H/8, W/8]."""
        z = self.model.encode(frames.to(self.mean)[None]).latent_dist.mode()
        return ((z - self.mean) * self.inverse_std)[0]


def to_uint8(frames: Tensor) -> np.ndarray:
    """[F, 3, H, W] float32 in -1…1 → [F, H, W, 3] uint8, cut off rather than rounded, as the published writer does."""
    return ((frames + 1) / 2 * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def check_vae(checkpoint: Checkpoint) -> None:
    """Names and shapes of the VAE's file, without reading a weight. Raises RequestError."""
    source = checkpoint.vae
    found = {vae_name(name): shape for name, shape in source.shapes.items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in _empty(checkpoint).state_dict().items()}
    check_names(str(source.path), found, wanted)


def _empty(checkpoint: Checkpoint):  # type: ignore[no-untyped-def]  # diffusers comes late
    """The model on `meta`; its width and channels are what the tensors say, the rest is diffusers' default."""
    from diffusers import AutoencoderKLWan

    shapes = checkpoint.vae.shapes
    try:
        width, channels = shapes["encoder.conv1.weight"][0], shapes["conv2.weight"][0]
    except KeyError as error:
        raise RequestError(f"{checkpoint.vae.path}: not a Wan VAE: misses {error}") from None
    with torch.device("meta"):
        return AutoencoderKLWan(base_dim=width, z_dim=channels)
