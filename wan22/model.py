"""The Wan2.2 diffusion transformer (one expert), with the published parameter names.

Legend: B batch, C channels, T H W latent grid, L video tokens (T · H/2 · W/2), M text tokens, N heads, D head dim,
E model width (= N · D).

Numerics (the `exact` recipe): the residual stream, modulation, norms, timestep embedding, rotary embedding, patch
embedding and head are float32, whatever the weights' dtype; the blocks' matrix products and attention run in
`dtype` with float32 accumulation. The modules declare their parameters in just those dtypes, so a loader reads off
the model what to cast each tensor to. A block's parts say by `dtype` what their first product takes: quantize.py may
have them ask for 8-bit rows, which the operation before then writes.

Source: Wan Team, "Wan: Open and Advanced Large-Scale Video Generative Models" (2025), section 4.2; the published
Wan2.2 `wan/modules/model.py`. Nothing here knows of files, devices, several GPUs or quantization: those are applied
from outside, at the seams named in docs/architecture.md.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan22.attention import attend
from wan22.kernels import (
    Rows,
    gated_residual,
    gated_residual_norm,
    gated_residual_norm_modulate,
    gelu,
    norm_modulate,
    qk_norm_rope,
    rms_norm,
)

ContextKV = list[tuple[Tensor, Tensor]]  # a block's cross-attention keys and values, each [B, M, N, D]


@dataclass(frozen=True)
class TransformerConfig:
    """The sizes of one expert, by their published names; the defaults of T2V-A14B stand in its config.json."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_dim: int = 16
    out_dim: int = 16
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    eps: float = 1e-6
    patch_size: tuple[int, int, int] = (1, 2, 2)

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads


class RMSNorm(nn.Module):
    """The norm of queries and keys: a float32 weight over the whole width."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))


class Attention(nn.Module):
    """The projections both attentions share. `attend` is an attribute so that it can be replaced from outside."""

    def __init__(self, config: TransformerConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_heads, self.eps, self.dtype = config.num_heads, config.eps, dtype
        self.attend: Callable[[Tensor, Tensor, Tensor], Tensor] = attend
        self.q = nn.Linear(config.dim, config.dim, dtype=dtype)
        self.k = nn.Linear(config.dim, config.dim, dtype=dtype)
        self.v = nn.Linear(config.dim, config.dim, dtype=dtype)
        self.o = nn.Linear(config.dim, config.dim, dtype=dtype)
        self.norm_q = RMSNorm(config.dim)
        self.norm_k = RMSNorm(config.dim)

    def project(self, names: str, x: Rows) -> tuple[Tensor, ...]:
        """x [B, L, E] → the products of these names (`qkv`: of q, k and v), each [B, L, E]: one after the other, or as
        the one that load.py has packed them into, under their names together."""
        if names in self._modules:
            return self._modules[names](x).chunk(len(names), dim=-1)  # type: ignore[misc]
        return tuple(self._modules[name](x) for name in names)  # type: ignore[misc]


class SelfAttention(Attention):
    """Full attention among the video tokens of one sample."""

    def forward(self, x: Rows, rope: tuple[Tensor, Tensor]) -> Tensor:
        """x [B, L, E] → [B, L, E]."""
        q, k, v = self.project("qkv", x)
        q, k = qk_norm_rope(
            q, k, self.norm_q.weight, self.norm_k.weight, rope, self.num_heads, self.eps
        )  # 2 × [B, L, N, D]
        v = v.unflatten(-1, (self.num_heads, -1))  # [B, L, N, D]
        return self.o(self.attend(q, k, v).flatten(-2))


class CrossAttention(Attention):
    """Attention from video tokens to the prompt. Keys and values do not depend on the step: made once a prompt."""

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """context [B, M, E] → keys and values, each [B, M, N, D]."""
        k, v = self.project("kv", context)
        k = rms_norm(k, self.norm_k.weight, self.eps)
        v = v.contiguous()  # a view of the packed product would keep the old keys alive too, for as long as the prompt
        return k.unflatten(-1, (self.num_heads, -1)), v.unflatten(-1, (self.num_heads, -1))

    def forward(self, x: Rows, keys_values: tuple[Tensor, Tensor]) -> Tensor:
        """x [B, L, E] → [B, L, E]."""
        q = rms_norm(self.q(x), self.norm_q.weight, self.eps).unflatten(-1, (self.num_heads, -1))
        return self.o(self.attend(q, *keys_values).flatten(-2))


class FeedForward(nn.Sequential):
    """Linear, GELU, Linear; a Sequential only for the published names `ffn.0` and `ffn.2`."""

    def __init__(self, config: TransformerConfig, dtype: torch.dtype) -> None:
        super().__init__(
            nn.Linear(config.dim, config.ffn_dim, dtype=dtype),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.ffn_dim, config.dim, dtype=dtype),
        )
        self.dtype = self.hidden_dtype = dtype  # what the first product takes, and the second

    def forward(self, x: Rows) -> Tensor:
        """x [B, L, E] → [B, L, E]."""
        return self[2](gelu(self[0](x), self.hidden_dtype))


class Block(nn.Module):
    """Self-attention and feed-forward under modulation by the timestep, cross-attention to the prompt between them."""

    def __init__(self, config: TransformerConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = config.eps
        self.self_attn = SelfAttention(config, dtype)
        self.norm3 = nn.LayerNorm(config.dim, eps=config.eps)  # the cross-attention's; published under this name
        self.cross_attn = CrossAttention(config, dtype)
        self.ffn = FeedForward(config, dtype)
        self.modulation = nn.Parameter(torch.empty(1, 6, config.dim))

    def forward(
        self, x: Tensor, time: Tensor, rope: tuple[Tensor, Tensor], keys_values: tuple[Tensor, Tensor]
    ) -> Tensor:
        """x [B, L, E] float32; time [B, 6, E] float32; rope 2 × [L, D/2]; keys_values 2 × [B, M, N, D] → like x.

        Without gradients x is overwritten: whoever needs it afterwards keeps a copy.
        """
        modulation = (self.modulation + time).unsqueeze(2).unbind(1)  # 6 × [B, 1, E]
        shift_sa, scale_sa, gate_sa, shift_ff, scale_ff, gate_ff = modulation
        eps, self_attn, norm3, cross_attn, ffn = self.eps, self.self_attn, self.norm3, self.cross_attn, self.ffn
        h = self_attn(norm_modulate(x, shift_sa, scale_sa, eps, self_attn.dtype), rope)
        x, h = gated_residual_norm(x, h, gate_sa, norm3.weight, norm3.bias, eps, cross_attn.dtype)
        x, h = gated_residual_norm_modulate(x, cross_attn(h, keys_values), None, shift_ff, scale_ff, eps, ffn.dtype)
        return gated_residual(x, ffn(h), gate_ff)


class PatchEmbedding(nn.Module):
    """Latents → tokens. A convolution whose stride is its kernel is a matrix product over patches: written as one,
    it stays float32 on a GPU too, where PyTorch lets convolutions use TF32."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.weight = nn.Parameter(torch.empty(config.dim, config.in_dim, *config.patch_size))
        self.bias = nn.Parameter(torch.zeros(config.dim))

    def forward(self, latents: Tensor) -> Tensor:
        """latents [B, C, T, H, W] → tokens [B, L, E]; H and W multiples of the patch size."""
        (b, c, t, h, w), (pt, ph, pw) = latents.shape, self.patch_size
        patches = latents.reshape(b, c, t // pt, pt, h // ph, ph, w // pw, pw)
        patches = patches.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(b, -1, c * pt * ph * pw)
        return F.linear(patches, self.weight.flatten(1), self.bias)


class Head(nn.Module):
    """Tokens → patches of velocity, under modulation by the timestep; float32."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.head = nn.Linear(config.dim, config.out_dim * math.prod(config.patch_size))
        self.modulation = nn.Parameter(torch.empty(1, 2, config.dim))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x [B, L, E]; time [B, E] → [B, L, prod(patch) · C], channels last."""
        shift, scale = (self.modulation + time.unsqueeze(1)).unsqueeze(2).unbind(1)  # 2 × [B, 1, E]
        return self.head(norm_modulate(x, shift, scale, self.eps, torch.float32))


class RotaryTable(nn.Module):
    """The angles of the three-axis rotary embedding, kept for the last shape asked."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        third = head_dim // 6
        self.axes = (head_dim // 2 - 2 * third, third, third)  # pairs turned by time, height, width
        self._last: tuple[tuple[int, int, int], torch.device, tuple[Tensor, Tensor]] | None = None

    def forward(self, grid: tuple[int, int, int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Token grid (T, H, W) → cosine and sine, each [L, D/2] float32, computed in float64."""
        if self._last is None or self._last[:2] != (grid, device):
            angles = []
            for axis, (size, pairs) in enumerate(zip(grid, self.axes, strict=True)):
                frequencies = 10000.0 ** -(torch.arange(pairs, dtype=torch.float64) / pairs)
                angle = torch.outer(torch.arange(size, dtype=torch.float64), frequencies)  # [size, pairs]
                view = [1, 1, 1, pairs]
                view[axis] = size
                angles.append(angle.view(view).expand(*grid, pairs))
            table = torch.cat(angles, dim=-1).flatten(0, 2)  # [L, D/2]
            self._last = (grid, device, (table.cos().float().to(device), table.sin().float().to(device)))
        return self._last[2]


def timestep_embedding(timestep: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding, cosines first, in float64: timestep [B] in 0…1000 → [B, dim] float32.

    Source: Vaswani et al., "Attention Is All You Need" (2017), section 3.5; the published `sinusoidal_embedding_1d`.
    """
    half = dim // 2
    frequencies = 10000.0 ** -(torch.arange(half, dtype=torch.float64, device=timestep.device) / half)
    angles = timestep.double().unsqueeze(1) * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=1).float()


class WanTransformer(nn.Module):
    """One expert: noisy latents, a timestep and a prompt → velocity.

    `dtype` is that of the blocks' matrix products and attention; build under `torch.device("meta")` to allocate
    nothing. Parameters are not initialized here: load them, or call `init_weights`.
    """

    def __init__(self, config: TransformerConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        dim = config.dim
        self.patch_embedding = PatchEmbedding(config)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim, dtype=dtype), nn.GELU(approximate="tanh"), nn.Linear(dim, dim, dtype=dtype)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.rotary = RotaryTable(config.head_dim)
        self.blocks = nn.ModuleList(Block(config, dtype) for _ in range(config.num_layers))
        self.head = Head(config)

    def embed_context(self, context: Tensor) -> ContextKV:
        """A prompt's cross-attention keys and values for every block: once a prompt, not once a step.

        context [B, M, text_dim], M ≤ text_len → padded with zero rows to text_len, which take part in attention,
        as published.
        """
        context = F.pad(context, (0, 0, 0, self.config.text_len - context.shape[1]))
        context = self.text_embedding(context.to(self.dtype))  # [B, text_len, E]
        return [block.cross_attn.keys_values(context) for block in self.blocks]  # type: ignore[operator, union-attr]

    def forward(self, latents: Tensor, timestep: Tensor, context: ContextKV) -> Tensor:
        """latents [B, C, T, H, W] float32; timestep [B] float32, 0…1000; context from `embed_context`
        → velocity [B, C, T, H, W] float32."""
        grid = self._token_grid(latents)
        x = self.patch_embedding(latents)  # [B, L, E]
        rope = self.rotary(grid, latents.device)  # 2 × [L, D/2]
        time = self.time_embedding(timestep_embedding(timestep, self.config.freq_dim))  # [B, E]
        block_time = self.time_projection(time).unflatten(1, (6, -1))  # [B, 6, E]
        x = self.run_blocks(x, block_time, rope, context)
        return self._unpatchify(self.head(x, time), grid)

    def run_blocks(self, x: Tensor, time: Tensor, rope: tuple[Tensor, Tensor], context: ContextKV) -> Tensor:
        """All blocks in order, arguments as theirs. Replaceable from outside."""
        for block, keys_values in zip(self.blocks, context, strict=True):
            x = block(x, time, rope, keys_values)
        return x

    def _token_grid(self, latents: Tensor) -> tuple[int, int, int]:
        (t, h, w), (pt, ph, pw) = latents.shape[2:], self.config.patch_size
        return t // pt, h // ph, w // pw

    def _unpatchify(self, patches: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """patches [B, L, prod(patch) · C] → [B, C, T, H, W]."""
        (t, h, w), (pt, ph, pw) = grid, self.config.patch_size
        patches = patches.reshape(-1, t, h, w, pt, ph, pw, self.config.out_dim)
        return patches.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(-1, self.config.out_dim, t * pt, h * ph, w * pw)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """The published initialization, for training and benchmarks: Xavier for products, 0.02 for embeddings' layers,
        zero for biases and the head's product."""
        for name, parameter in self.named_parameters():
            if name.endswith("modulation"):
                parameter.normal_(std=self.config.dim**-0.5, generator=generator)
            elif name == "head.head.weight" or name.endswith("bias"):
                parameter.zero_()
            elif name.startswith(("text_embedding", "time_embedding")):
                parameter.normal_(std=0.02, generator=generator)
            elif parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                fan_in, fan_out = parameter[0].numel(), parameter.shape[0]
                bound = math.sqrt(6 / (fan_in + fan_out))
                parameter.uniform_(-bound, bound, generator=generator)
