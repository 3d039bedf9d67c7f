"""Packed products: the same numbers, under the published names."""

import pytest
import torch

from wan22.load import load_expert
from wan22.model import TransformerConfig, WanTransformer
from wan22.pack import PACKED, join, pack, side_by_side

CONFIG = TransformerConfig(dim=72, ffn_dim=80, num_heads=3, num_layers=2, freq_dim=16, text_dim=8, text_len=5)


def make(dtype, packed):
    """A model whose tensors lie as packing wants them."""
    source = WanTransformer(CONFIG, dtype)
    source.init_weights(torch.Generator().manual_seed(0))
    torch.nn.init.normal_(source.head.head.weight, std=0.1, generator=torch.Generator().manual_seed(1))
    wanted, state = source.state_dict(), {}
    for names in side_by_side(wanted):
        whole = torch.cat([wanted[name] for name in names])
        state.update(zip(names, whole.split([len(wanted[name]) for name in names]), strict=True))
    model = WanTransformer(CONFIG, dtype)
    model.load_state_dict(state, assign=True)
    if packed:
        pack(model)
    return model.requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_numbers(dtype):
    """Bit for bit on this CPU; elsewhere a wider product may be summed in another order."""
    plain, packed = make(dtype, False), make(dtype, True)
    latents, context = torch.randn(1, 16, 2, 4, 6), torch.randn(1, 4, 8)
    outs = []
    for model in (plain, packed):
        with torch.inference_mode():
            outs.append(model(latents, torch.tensor([500.0]), model.embed_context(context)))
    difference = (outs[0] - outs[1]).abs()
    print(f"{dtype}: largest {difference.max():.2e}, mean {difference.mean():.2e}")
    assert difference.max() <= (2e-2 if dtype == torch.bfloat16 else 1e-5) * outs[0].abs().max()


def test_names_and_memory():
    plain, packed = make(torch.float32, False), make(torch.float32, True)
    assert {name for name, _ in packed.blocks[0].self_attn.named_children()} == {"o", "norm_q", "norm_k", "qkv"}
    assert {name for name, _ in packed.blocks[0].cross_attn.named_children()} == {"q", "o", "norm_q", "norm_k", "kv"}
    published, ours = plain.state_dict(), packed.state_dict()
    assert set(ours) == set(published)
    assert all(torch.equal(ours[name], tensor) for name, tensor in published.items())
    joint = packed.blocks[1].self_attn.qkv.weight
    ours["blocks.1.self_attn.k.weight"].fill_(7.0)  # no copy: a view of the packed tensor
    assert (joint[CONFIG.dim : 2 * CONFIG.dim] == 7.0).all()
    packed.load_state_dict(published, strict=True)
    assert all(torch.equal(packed.state_dict()[name], tensor) for name, tensor in published.items())
    del published["blocks.0.cross_attn.v.bias"]
    with pytest.raises(RuntimeError, match=r"blocks.0.cross_attn"):
        packed.load_state_dict(published, strict=True)


def test_an_expert_is_packed_in_place(tiny):
    model = load_expert(next(iter(tiny.experts.values())), torch.float32, torch.device("cpu"))
    for block in model.blocks:
        for part, names in PACKED.items():
            assert isinstance(getattr(block, part).get_submodule(names), torch.nn.Linear)


def test_streamed_pieces_lie_side_by_side(tiny):
    from wan22.residency.streaming import pieces_of

    model = WanTransformer(CONFIG)  # of a width that the pieces' alignment does not divide
    for piece in pieces_of(model).values():
        views = piece.views(torch.empty(piece.nbytes, dtype=torch.uint8))
        for names in side_by_side(views):
            assert join([views[name] for name in names]) is not None, names


def test_join():
    whole = torch.arange(24.0).view(6, 4)
    parts = list(whole.split([1, 2, 3]))
    assert join(parts).data_ptr() == whole.data_ptr()
    assert torch.equal(join(parts), whole)
    assert join([parts[1], parts[0]]) is None
    assert join([parts[0], parts[2]]) is None
    assert join([parts[0], parts[1].clone()]) is None
