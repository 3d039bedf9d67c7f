"""A checkpoint's sizes, and what each phase of a run takes, as sums of named terms: arithmetic from shapes alone.

Legend: L video tokens, E model width, F feed-forward width, M text tokens, e bytes of the weights' dtype (2 or 4).
The terms are named so that measured peaks can be held against them; those of a block follow model.py line by line.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any, Self

from wan22.config import CHUNK_TOKENS, DEFAULT_TASK, MODEL_SPECS, Precision, Request, Residency, configs_dir

if TYPE_CHECKING:
    from wan22.checkpoint import Checkpoint

Terms = dict[str, int]  # bytes by name
ITEM = {"float32": 4, "bf16": 2, "fp8": 2, "int8": 2}  # bytes of what is not always float32 and not in 8 bits
KEPT_FLOAT32 = ("patch_embedding", "time_embedding", "time_projection", "head.", "modulation", "norm")  # by model.py
SOLVER_COPIES = 8  # of the latents: noise, solver history, two velocities, their combination
# Of torch's cuBLAS, for good, by its default: 32 MiB on Hopper and Blackwell (8 on cards before). See its
# aten/src/ATen/cuda/CublasHandlePool.cpp.
WORKSPACE = 32 << 20


@dataclass(frozen=True)
class Sizes:
    """A checkpoint's sizes. rest, block: elements (kept in float32, in the weights' dtype) outside and in one block;
    text_encoder, text_embedding: elements in all, and of its largest piece; files: bytes on disk."""

    dim: int
    ffn_dim: int
    num_layers: int
    rest: tuple[int, int]
    block: tuple[int, int]
    text_encoder: int
    text_embedding: int
    text_heads: int
    vae_width: int
    files: int
    num_heads: int
    text_len: int = MODEL_SPECS[DEFAULT_TASK].text_len
    eight_bit: int = 0  # of the block's elements
    scales: int = 0  # float32 numbers beside them: one an output channel

    @classmethod
    def published(cls) -> Self:
        """Those of Wan2.2-T2V-A14B, from its names, shapes and manifest."""
        folder = configs_dir() / "Wan2.2-T2V-A14B"
        shapes = json.loads((folder / "tensors.json").read_text())
        config = json.loads((folder / "high_noise_model" / "config.json").read_text())
        files = {file["path"]: file["size"] for file in json.loads((folder / "manifest.json").read_text())["files"]}
        text = next(size for path, size in files.items() if path.startswith("models_t5")) // ITEM["bf16"]
        # The text encoder's and the VAE's shapes are no part of the package: UMT5-XXL's own, and the VAE's width.
        return cls(**_expert_sizes(shapes), text_encoder=text, text_embedding=256384 * 4096, text_heads=64,
                   vae_width=96, files=sum(files.values()), num_heads=config["num_heads"])  # fmt: skip

    @classmethod
    def of(cls, checkpoint: "Checkpoint") -> Self:
        """Those of an opened checkpoint. A pickle is not opened for it, which takes torch: its text encoder is taken
        for bf16, as published, and its VAE for the published width."""
        first = next(iter(checkpoint.experts.values()))
        expert = first.tensors
        parts = [*(expert.tensors for expert in checkpoint.experts.values()), checkpoint.text_encoder, checkpoint.vae]
        files = sum(path.stat().st_size for part in parts for path in part.files)
        text, vae = checkpoint.text_encoder, checkpoint.vae
        published = cls.published()
        if text.path.suffix in (".pth", ".pt", ".bin"):
            elements = sum(path.stat().st_size for path in text.files) // ITEM["bf16"]
            embedding, heads = min(elements, published.text_embedding), published.text_heads
        else:
            elements = sum(prod(shape) for shape in text.shapes.values())
            embedding = prod(text.shapes.get("token_embedding.weight", (0,)))
            heads = text.shapes.get("blocks.0.pos_embedding.embedding.weight", (0, published.text_heads))[1]
        pickled = vae.path.suffix in (".pth", ".pt", ".bin")
        width = published.vae_width if pickled else vae.shapes.get("encoder.conv1.weight", (published.vae_width,))[0]
        return cls(**_expert_sizes(expert.shapes), text_encoder=elements, text_embedding=embedding, text_heads=heads,
                   vae_width=width, files=files, num_heads=first.config["num_heads"])  # fmt: skip

    def at(self, precision: Precision) -> Self:
        """The same model with its blocks' products in 8 bits, where a resolved precision has them so (quantize.py)."""
        if not precision.scope:
            return self
        elements, scales = 2 * self.dim * self.ffn_dim, self.dim + self.ffn_dim
        if precision.scope == "all":  # q, k, v, o of self-attention, q and o of cross-attention
            elements, scales = elements + 6 * self.dim**2, scales + 6 * self.dim
        return replace(self, eight_bit=elements, scales=scales)

    def rest_bytes(self, item: int) -> int:
        return 4 * self.rest[0] + item * self.rest[1]

    def block_bytes(self, item: int) -> int:
        plain = item * (self.block[1] - self.eight_bit)
        return 4 * (self.block[0] + self.scales) + plain + self.eight_bit

    def expert_bytes(self, item: int) -> int:
        return self.rest_bytes(item) + self.num_layers * self.block_bytes(item)


def _expert_sizes(shapes: Mapping[str, Any]) -> dict[str, Any]:
    rest, block = [0, 0], [0, 0]
    for name, shape in shapes.items():
        if not name.startswith("blocks.") or name.startswith("blocks.0."):
            counts = block if name.startswith("blocks.") else rest
            counts[not any(kept in name for kept in KEPT_FLOAT32)] += prod(shape)
    layers = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks."))
    ffn_dim, dim = shapes["blocks.0.ffn.0.weight"]
    return {"dim": dim, "ffn_dim": ffn_dim, "num_layers": layers, "rest": tuple(rest), "block": tuple(block)}


def total(terms: Terms) -> int:
    return sum(terms.values())


# --- the terms -------------------------------------------------------------------------------------------------------
def block_moments(
    tokens: int, sizes: Sizes, item: int, fused: bool, eight_bit_attention: bool = False
) -> dict[str, Terms]:
    """What is alive at each moment of a block, beside weights and what lasts. fused: the Triton kernels work in place
    or write only their result; the plain operations make float32 arrays on the way. With 8-bit products an activation
    before one takes half of what stands here.

    R is the residual stream, 4 · L · E bytes: updated in place. B is e · L · E: one activation in the weights' dtype.
    """
    r, b = 4 * tokens * sizes.dim, item * tokens * sizes.dim
    chunk = min(tokens, CHUNK_TOKENS)
    hidden = item * chunk * sizes.ffn_dim
    return {
        # h = norm_modulate(x): layer_norm's result and the modulated one in float32, then h
        "norm": {"residual": r, "h": b, "float32 arrays": 0 if fused else 2 * r},
        # q, k and v of h as one product; new q and k. Plain: three float32 arrays (square, products, halves) for one
        "q k v": {"residual": r, "h": b, "q k v": 3 * b, "new q k": 2 * b if fused else b,
                  "float32 arrays": 0 if fused else 3 * r},
        # o(attend(q, k, v)): all alive till it returns, the packed product for v's sake
        "attention": {"residual": r, "h": b, "q k v": 3 * b, "new q k": 2 * b, "attended": b, "o": b,
                      **({"8-bit q k v": 3 * tokens * sizes.dim} if eight_bit_attention else {})},
        # x += y, then the norm of it
        "sum": {"residual": r, "y": b, "h": b, "float32 arrays": 0 if fused else 2 * r},
        # h, q, normed q, attended, o; keys and values are the prompt's, and last
        "cross-attention": {"residual": r, "h": b, "q": 2 * b, "attended": b, "o": b,
                            "float32 arrays": 0 if fused else r},
        # a chunk's hidden layer, its activation (in place when fused) and result
        "feed-forward": {"residual": r, "h": b, "out": b, "hidden": hidden * (1 if fused else 2),
                         "chunk": item * chunk * sizes.dim},
        # float32 to the end: norm, modulated, then 64 numbers a token and their rearrangement
        "head": {"residual": r, "float32 arrays": r if fused else 2 * r, "velocity": 2 * 4 * tokens * 64},
    }  # fmt: skip


def lasting_terms(request: Request, sizes: Sizes, item: int) -> Terms:
    """What a run of steps keeps beside weights: both prompts' keys and values, latents and solver, rotary table."""
    return {
        "keys and values of prompts": _branches(request) * sizes.num_layers * 2 * sizes.text_len * sizes.dim * item,
        "latents and solver": SOLVER_COPIES * 4 * prod(request.latent_shape),
        "rotary table": rotary_bytes(request),
        **reading_terms(request, sizes, item),
    }


def rotary_bytes(request: Request) -> int:
    """An expert's cosines and sines, float32, of 64 pairs a token."""
    return 2 * 4 * tokens_of(request) * 64


def reading_terms(request: Request, sizes: Sizes, item: int) -> Terms:
    """Beside an expert's weights while they are read."""
    return {
        # A block on its way to the host's memory is merged on the device, its largest tensor in float32 beside it.
        **({"merging adapters": sizes.block_bytes(item) + 4 * sizes.ffn_dim * sizes.dim} if request.loras else {}),
        # And quantized: the float32 numbers, their quotients, and the 8-bit ones.
        **({"quantizing": sizes.block_bytes(item) + 9 * sizes.ffn_dim * sizes.dim} if sizes.eight_bit else {}),
    }


def cache_terms(
    request: Request, sizes: Sizes, precision: Precision, sequence: int = 1, guidance: int = 1
) -> Terms:
    """Of the step cache: the two arrays that each branch keeps, and the residual stream after the first block.
    sequence, guidance: ranks that share the tokens, and the branches."""
    if not precision.step_cache:
        return {}
    numbers = -(-tokens_of(request) // sequence) * sizes.dim
    return {"step cache": numbers * (-(-_branches(request) // guidance) * 2 * ITEM[precision.weights] + 4)}


def _branches(request: Request) -> int:
    return 2 if request.guided else 1


def tokens_of(request: Request) -> int:
    _, frames, height, width = request.latent_shape
    return frames * (height // 2) * (width // 2)


def weight_terms(residency: Residency, sizes: Sizes, item: int, shards: int = 1) -> Terms:
    """On the device. shards: ranks that each keep a part; the block at work and the next are whole, and copied."""
    if residency.kind in ("none", "expert"):
        whole = {} if shards == 1 else {"gathered": sizes.rest_bytes(item) + 4 * sizes.block_bytes(item)}
        return {"experts": (2 if residency.kind == "none" else 1) * -(-sizes.expert_bytes(item) // shards), **whole}
    block = sizes.block_bytes(item)
    resident = max(0, sizes.num_layers - _streamed(residency, sizes))
    return {"outside the blocks": sizes.rest_bytes(item), "resident blocks": resident * block, "two buffers": 2 * block}


def _streamed(residency: Residency, sizes: Sizes) -> int:
    count = max(sizes.num_layers - residency.resident_blocks, 2)
    return min(count + count % 2, sizes.num_layers - sizes.num_layers % 2)


def host_terms(residency: Residency, sizes: Sizes, item: int) -> Terms:
    """Of the host's memory: pinned copies. With one place in all, resident blocks are not in it."""
    if not residency.host_experts:
        return {}
    if residency.kind == "block" and residency.host_experts == 1:
        return {"pinned blocks": _streamed(residency, sizes) * sizes.block_bytes(item)}
    return {"pinned experts": residency.host_experts * sizes.expert_bytes(item)}


def text_terms(mode: str, sizes: Sizes, item: int, shards: int = 1) -> Terms:
    """mode: `device`, `stream` (accelerate brings one layer at a time; the embedding is the largest) or `cpu`. Eager
    attention makes scores in the weights' dtype and in float32, and the position bias."""
    if mode == "cpu":
        return {}
    scores = sizes.text_heads * sizes.text_len**2 * (3 * item + 8)
    weights = item * (sizes.text_encoder if mode == "device" else sizes.text_encoder // 24)
    if shards > 1:  # the embedding is whole all along, and two layers
        weights = item * (sizes.text_encoder // shards + sizes.text_embedding + sizes.text_encoder // 12)
    elif mode == "stream" and item * sizes.text_embedding > weights + scores:
        return {"embedding": item * sizes.text_embedding}  # which is gone before there are scores
    return {"weights": weights, "scores": scores}
