"""What the same tensor is called elsewhere: published names ↔ those of diffusers, transformers and llama.cpp.

A table holds regular expressions, matched against whole names, and what they become. Sources: the published
`wan/modules/*.py`; diffusers' `single_file_utils.py` (`convert_wan_*`); transformers' `modeling_umt5.py`; the gguf
package's `tensor_mapping.py` for `t5encoder`.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

Rules = Mapping[str, str]


def rename(name: str, rules: Rules) -> str:
    """The first rule that matches the whole name gives its new form. Raises KeyError where none does."""
    for pattern, template in rules.items():
        if match := re.fullmatch(pattern, name):
            return match.expand(template)
    raise KeyError(name)


PREFIXES = ("model.diffusion_model.", "diffusion_model.")  # ComfyUI's


def unprefixed(name: str) -> str:
    return next((name.removeprefix(prefix) for prefix in PREFIXES if name.startswith(prefix)), name)


# --- published ← elsewhere -------------------------------------------------------------------------------------------
EXPERT_FROM_DIFFUSERS: Rules = {
    r"(patch_embedding\..+)": r"\1",
    r"condition_embedder\.(time|text)_embedder\.linear_1\.(.+)": r"\1_embedding.0.\2",
    r"condition_embedder\.(time|text)_embedder\.linear_2\.(.+)": r"\1_embedding.2.\2",
    r"condition_embedder\.time_proj\.(.+)": r"time_projection.1.\1",
    r"condition_embedder\.image_embedder\.(.+)": r"img_emb.\1",
    r"scale_shift_table": r"head.modulation",
    r"proj_out\.(.+)": r"head.head.\1",
    r"(blocks\.\d+)\.scale_shift_table": r"\1.modulation",
    r"(blocks\.\d+)\.norm2\.(.+)": r"\1.norm3.\2",  # the cross-attention's; diffusers counts by order of use
    r"(blocks\.\d+)\.attn1\.to_([qkv])\.(.+)": r"\1.self_attn.\2.\3",
    r"(blocks\.\d+)\.attn2\.to_([qkv])\.(.+)": r"\1.cross_attn.\2.\3",
    r"(blocks\.\d+)\.attn1\.to_out\.0\.(.+)": r"\1.self_attn.o.\2",
    r"(blocks\.\d+)\.attn2\.to_out\.0\.(.+)": r"\1.cross_attn.o.\2",
    r"(blocks\.\d+)\.attn1\.(norm_[qk]\..+)": r"\1.self_attn.\2",
    r"(blocks\.\d+)\.attn2\.(norm_[qk]\..+)": r"\1.cross_attn.\2",
    r"(blocks\.\d+)\.ffn\.net\.0\.proj\.(.+)": r"\1.ffn.0.\2",
    r"(blocks\.\d+)\.ffn\.net\.2\.(.+)": r"\1.ffn.2.\2",
}

TEXT_ENCODER_FROM_TRANSFORMERS: Rules = {
    r"(?:shared|encoder\.embed_tokens)\.weight": r"token_embedding.weight",
    r"encoder\.final_layer_norm\.weight": r"norm.weight",
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

TEXT_ENCODER_FROM_LLAMA_CPP: Rules = {
    r"token_embd\.weight": r"token_embedding.weight",
    r"enc\.output_norm\.weight": r"norm.weight",
    r"enc\.blk\.(\d+)\.attn_([qkvo])\.weight": r"blocks.\1.attn.\2.weight",
    r"enc\.blk\.(\d+)\.attn_rel_b\.weight": r"blocks.\1.pos_embedding.embedding.weight",
    r"enc\.blk\.(\d+)\.attn_norm\.weight": r"blocks.\1.norm1.weight",
    r"enc\.blk\.(\d+)\.ffn_norm\.weight": r"blocks.\1.norm2.weight",
    r"enc\.blk\.(\d+)\.ffn_gate\.weight": r"blocks.\1.ffn.gate.0.weight",
    r"enc\.blk\.(\d+)\.ffn_up\.weight": r"blocks.\1.ffn.fc1.weight",
    r"enc\.blk\.(\d+)\.ffn_down\.weight": r"blocks.\1.ffn.fc2.weight",
}

# What may lie beside an encoder: a whole T5's decoder, and the tokenizer that ComfyUI's files carry.
TEXT_ENCODER_UNUSED = r"decoder\..+|dec\..+|lm_head\.weight|output\.weight|spiece_model"

Part = tuple[str, str | Callable[[re.Match[str]], str]]
VAE_FROM_DIFFUSERS: tuple[Part, ...] = (
    (r"\.norm1\.", r".residual.0."),
    (r"\.conv1\.", r".residual.2."),
    (r"\.norm2\.", r".residual.3."),
    (r"\.conv2\.", r".residual.6."),
    (r"\.conv_shortcut\.", r".shortcut."),
    (r"^(en|de)coder\.conv_in\.", r"\1coder.conv1."),
    (r"^quant_conv\.", r"conv1."),
    (r"^post_quant_conv\.", r"conv2."),
    (r"\.mid_block\.resnets\.([01])\.", lambda match: f".middle.{2 * int(match[1])}."),
    (r"\.mid_block\.attentions\.0\.", r".middle.1."),
    (r"\.norm_out\.", r".head.0."),
    (r"\.conv_out\.", r".head.2."),
    (r"\.down_blocks\.", r".downsamples."),
    # The published decoder counts its layers through; in each group of four, three are residual, one goes up.
    (r"\.up_blocks\.(\d)\.resnets\.(\d)\.", lambda match: f".upsamples.{4 * int(match[1]) + int(match[2])}."),
    (r"\.up_blocks\.(\d)\.upsamplers\.0\.", lambda match: f".upsamples.{4 * int(match[1]) + 3}."),
)

# --- published → elsewhere -------------------------------------------------------------------------------------------
TEXT_ENCODER_TO_TRANSFORMERS: Rules = {
    r"token_embedding\.weight": r"shared.weight",
    r"norm\.weight": r"encoder.final_layer_norm.weight",
    r"blocks\.(\d+)\.attn\.([qkvo])\.weight": r"encoder.block.\1.layer.0.SelfAttention.\2.weight",
    r"blocks\.(\d+)\.pos_embedding\.embedding\.weight": (
        r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias.weight"
    ),
    r"blocks\.(\d+)\.norm1\.weight": r"encoder.block.\1.layer.0.layer_norm.weight",
    r"blocks\.(\d+)\.norm2\.weight": r"encoder.block.\1.layer.1.layer_norm.weight",
    r"blocks\.(\d+)\.ffn\.gate\.0\.weight": r"encoder.block.\1.layer.1.DenseReluDense.wi_0.weight",
    r"blocks\.(\d+)\.ffn\.fc1\.weight": r"encoder.block.\1.layer.1.DenseReluDense.wi_1.weight",
    r"blocks\.(\d+)\.ffn\.fc2\.weight": r"encoder.block.\1.layer.1.DenseReluDense.wo.weight",
}

VAE_TO_DIFFUSERS: tuple[Part, ...] = (
    (r"^(en|de)coder\.conv1\.", r"\1coder.conv_in."),
    (r"^conv1\.", r"quant_conv."),
    (r"^conv2\.", r"post_quant_conv."),
    (r"\.middle\.([02])\.", lambda match: f".mid_block.resnets.{int(match[1]) // 2}."),
    (r"\.middle\.1\.", r".mid_block.attentions.0."),
    (r"\.head\.0\.", r".norm_out."),
    (r"\.head\.2\.", r".conv_out."),
    (r"\.downsamples\.", r".down_blocks."),
    (r"\.upsamples\.(\d+)\.", lambda match: ".up_blocks.{}.{}.".format(
        int(match[1]) // 4, "upsamplers.0" if int(match[1]) % 4 == 3 else f"resnets.{int(match[1]) % 4}")),
    (r"\.residual\.0\.", r".norm1."),
    (r"\.residual\.2\.", r".conv1."),
    (r"\.residual\.3\.", r".norm2."),
    (r"\.residual\.6\.", r".conv2."),
    (r"\.shortcut\.", r".conv_shortcut."),
)  # fmt: skip


def _in_parts(name: str, parts: tuple[Part, ...]) -> str:
    for pattern, replacement in parts:
        name = re.sub(pattern, replacement, name)
    return name


def text_encoder_name(published: str) -> str:
    """A published text-encoder tensor's name in transformers' `UMT5EncoderModel`. Raises KeyError."""
    return rename(published, TEXT_ENCODER_TO_TRANSFORMERS)


def vae_name(published: str) -> str:
    """A published VAE tensor's name in diffusers' `AutoencoderKLWan`."""
    return _in_parts(published, VAE_TO_DIFFUSERS)


def published_vae_name(name: str) -> str:
    """The published name of a tensor of diffusers' `AutoencoderKLWan`."""
    return _in_parts(name, VAE_FROM_DIFFUSERS)


# --- configs ---------------------------------------------------------------------------------------------------------
def published_config(diffusers: Mapping[str, Any]) -> dict[str, Any]:
    """A config of diffusers' `WanTransformer3DModel` under the published names; what it lacks is left out."""
    names = {"num_attention_heads": "num_heads", "in_channels": "in_dim", "out_channels": "out_dim"}
    kept = ("ffn_dim", "freq_dim", "num_layers", "text_dim", "eps", "patch_size", "_name_or_path")
    config = {names.get(name, name): diffusers[name] for name in (*names, *kept) if name in diffusers}
    heads, head_dim = diffusers.get("num_attention_heads"), diffusers.get("attention_head_dim")
    if isinstance(heads, int) and isinstance(head_dim, int):
        config["dim"] = heads * head_dim
    if diffusers.get("image_dim") or diffusers.get("added_kv_proj_dim"):
        config["model_type"] = "i2v"
    return config
