"""The `exact` recipe's rounding error in bf16, and what it keeps in float32."""

import torch

from wan22.model import TransformerConfig, WanTransformer

CONFIG = TransformerConfig(dim=384, ffn_dim=1024, num_heads=3, num_layers=40, freq_dim=256, text_dim=64, text_len=32)


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return ((ours.double() - reference.double()).norm() / reference.double().norm()).item()


def guided(velocity) -> torch.Tensor:
    conditional, unconditional = velocity(0), velocity(1)
    return unconditional + 4.0 * (conditional - unconditional)


def test_exact_in_bf16_against_diffusers(tmp_path):
    """After guidance 4.0, a random 40-layer model: at most a third of the error of diffusers' bf16 transformer."""
    from diffusers import WanTransformer3DModel
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    generator = torch.Generator().manual_seed(0)
    reference = WanTransformer(CONFIG)
    reference.init_weights(generator)
    torch.nn.init.normal_(reference.head.head.weight, std=0.02, generator=generator)
    ours = WanTransformer(CONFIG, torch.bfloat16)
    ours.load_state_dict(reference.state_dict())
    theirs = WanTransformer3DModel(
        num_attention_heads=CONFIG.num_heads, attention_head_dim=CONFIG.head_dim, text_dim=CONFIG.text_dim,
        freq_dim=CONFIG.freq_dim, ffn_dim=CONFIG.ffn_dim, num_layers=CONFIG.num_layers,
    )  # fmt: skip
    theirs.load_state_dict(convert_wan_transformer_to_diffusers(dict(reference.state_dict())))
    theirs.save_pretrained(tmp_path)  # loaded as its users load it: some of its modules stay in float32 then
    theirs = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)

    latents = torch.randn(1, 16, 3, 8, 8, generator=generator)
    contexts = torch.randn(2, 1, 32, 64, generator=generator)
    timestep = torch.tensor([900.0])
    with torch.inference_mode():
        truth = guided(lambda i: reference(latents, timestep, reference.embed_context(contexts[i])))
        ours_bf16 = guided(lambda i: ours(latents, timestep, ours.embed_context(contexts[i])))
        theirs_bf16 = guided(
            lambda i: theirs(latents.bfloat16(), timestep, contexts[i].bfloat16(), return_dict=False)[0].float()
        )
    error, their_error = relative_error(ours_bf16, truth), relative_error(theirs_bf16, truth)
    print(f"relative RMS error: this recipe {error:.2e}, diffusers in bf16 {their_error:.2e}")
    assert error < their_error / 3


def test_what_stays_float32():
    model = WanTransformer(CONFIG, torch.bfloat16)
    rounded = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.bfloat16}
    expected = {"text_embedding.0.weight", "text_embedding.2.bias", "blocks.0.self_attn.q.weight",
                "blocks.39.cross_attn.o.bias", "blocks.7.ffn.2.weight"}  # fmt: skip
    assert expected <= rounded
    for kept in ("modulation", "norm", "patch_embedding", "time_embedding", "time_projection", "head."):
        assert not any(kept in name for name in rounded), kept


def test_rotary_table_is_made_once_a_shape():
    model = WanTransformer(TransformerConfig(dim=64, ffn_dim=64, num_heads=2, num_layers=1, text_dim=8))
    cpu = torch.device("cpu")
    first = model.rotary((2, 4, 4), cpu)
    assert model.rotary((2, 4, 4), cpu)[0] is first[0]
    assert model.rotary((2, 4, 5), cpu)[0].shape == (40, 16)
