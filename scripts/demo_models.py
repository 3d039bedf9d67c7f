"""The demo's text encoder and experts in training, and the judge of what they make.

Legend: B batch, C latent channels, T H W latent grid, M text tokens, E text width.
"""

import argparse
import contextlib
import itertools
import math
import time
from pathlib import Path
from typing import Any

import demo_data
import torch
import torch.nn.functional as F
from demo_training import CLASSES, ROOT, SPEC, TRAINED_LEN, Size, autocast, say, to_frames, tokenizer_file, write_sheet
from demo_vae import WholeSequence, build_vae, published_statistics, trained_vae
from torch import Tensor, nn

from wan22.files.tensor_names import text_encoder_name
from wan22.model import TransformerConfig, WanTransformer

EXPERT: dict[str, Any] = {"dim": 192, "ffn_dim": 640, "num_heads": 6, "num_layers": 6, "freq_dim": 256, "text_dim": 128}


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
    bias[-1:].fill_(math.log(SPEC.text_len - TRAINED_LEN + 1))  # a fill, not a copy: it can be captured
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

        self.work, self.device = work, device
        self.tokenizer = Tokenizer.from_file(str(tokenizer_file(work)))
        self.text_encoder = build_text_encoder(self.tokenizer.get_vocab_size()).to(device)
        self.heads = Heads(EXPERT["text_dim"]).to(device)
        self.experts = {side: build_expert().to(device) for side in ("high", "low")}
        self.vae = build_vae(device)
        self.vae.load_state_dict(trained_vae(work))
        self.vae.requires_grad_(False)
        self.whole = WholeSequence(self.vae, channels_last=device.type == "cuda")
        self.mean, self.std = published_statistics(device)
        if device.type == "cuda":
            for expert in self.experts.values():
                keep_float32(expert)

    def part(self, name: str) -> nn.Module:
        """What one stage trains: `words` (the text encoder and its heads), `high` or `low`."""
        if name == "words":
            return nn.ModuleDict({"text_encoder": self.text_encoder, "heads": self.heads})
        return self.experts[name]

    def load(self, name: str, averaged: bool = True) -> dict[str, Any]:
        """A part as its training left it: with its average for weights, or with its own. Returns the state; where there
        is none, an empty one, and the weights are the package's, if it has them."""
        path = self.work / f"{name}.pt"
        if not path.exists():
            self._load_packaged(name)
            return {}
        state: dict[str, Any] = torch.load(path, map_location=self.device, weights_only=True)
        source = state["average"] if averaged or "own" not in state else state["own"]
        for key, parameter in self.part(name).named_parameters():
            parameter.data.copy_(source[f".{key}"])
        return state

    def _load_packaged(self, name: str) -> None:
        from safetensors.torch import load_file

        folder = ROOT / "wan22/demo"
        if name == "words":
            files, module = [folder / "models_t5_umt5-xxl-enc-bf16.safetensors"], self.text_encoder
        else:
            expert = SPEC.experts[("high", "low").index(name)]
            files, module = sorted((folder / expert).glob("*.safetensors")), self.experts[name]
        state = {key: tensor for file in files if file.exists() for key, tensor in load_file(file).items()}
        if state and name == "words":
            state = {text_encoder_name(key): tensor for key, tensor in state.items()}
        if state:
            module.load_state_dict(state, strict=name != "words")  # a text encoder has a second name for its embedding

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
            contexts = {expert: expert.embed_context(rows) for expert in self.experts.values()}
            for sigma, after in itertools.pairwise(sigmas):
                expert = self.experts["high" if sigma >= SPEC.boundary else "low"]
                timestep = torch.full((2 * len(x),), 1000 * sigma, device=self.device)
                velocity, plain = expert(torch.cat((x, x)), timestep, contexts[expert]).float().chunk(2)
                x = x + (after - sigma) * (plain + guidance * (velocity - plain))
        latents = x * self.std + self.mean
        return torch.cat([self.whole.decode(part) for part in latents.split(8)]).clamp(-1, 1)


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
