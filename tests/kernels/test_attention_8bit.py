"""8-bit attention: its error on queries and keys with outliers, and the kernel against its plain form."""

import math

import pytest
import torch
import torch.nn.functional as F
from gluon_on_cpu import attention_on_cpu

from wan22.attention import BACKENDS, attend, reference, relative_error
from wan22.config import Placement, Precision
from wan22.kernels import attention_8bit, attention_hopper
from wan22.kernels.attention_8bit import (
    FP8,
    PV,
    _transpose_and_quantize,
    attend_8bit,
    attend_8bit_plain,
    attend_around_fp8,
    fp8_kernel_plain,
    hadamard,
    prepare,
    quantize,
    quantize_v,
    smooth,
    statistics,
)
from wan22.pipeline import Pipeline
from wan22.report import Reporter


def outlying(length=1024, heads=2, dim=128, spread=3.0, batch=1):
    """bf16 queries, keys and values: a few channels 20 times the others, other ones in queries than in keys; keys with
    a mean of ten times the usual channel's size; scores that spread by `spread` (in the exponent). The values are
    white noise, which is the hardest: nothing in them averages out."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, length, heads, dim, generator=generator) for _ in range(3))
    q[..., [dim // 40, dim // 3, dim // 2]] *= 20
    k[..., [dim // 20, dim // 4, dim - 1]] *= 20
    q *= spread / (torch.einsum("blnd,bmnd->bnlm", q, k).std() / math.sqrt(dim))
    k = k + 10 * torch.randn(1, 1, heads, dim, generator=generator)
    return q.bfloat16(), k.bfloat16(), v.bfloat16()


def cosine(a, b):
    return F.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0).item()


def plain_fp8(q, k, v):
    """FlashAttention 3's FP8 as it is: one scale a head, nothing done before."""
    (q8, q_scale), (k8, k_scale), (v8, v_scale) = (quantize(x.float(), (1, 3), FP8) for x in (q, k, v))
    return fp8_kernel_plain(q8, k8, v8, *(scale[:, 0, :, 0] for scale in (q_scale, k_scale, v_scale)))


def test_smoothing_is_exact():
    q, k, v = (x.float() for x in outlying(length=60))
    smooth_q, smooth_k = smooth(q, k)
    assert relative_error(reference(smooth_q, smooth_k, v), reference(q, k, v)) < 2e-5
    assert torch.allclose(hadamard(64) @ hadamard(64), torch.eye(64), atol=1e-6)
    before, after = q.abs().amax() * k.abs().amax(), smooth_q.abs().amax() * smooth_k.abs().amax()
    print(f"largest |q| · largest |k|: {before:.0f} before, {after:.0f} after")
    assert after < before / 20
    with pytest.raises(ValueError, match="not a power of two"):
        hadamard(96)


@pytest.mark.parametrize("spread", [1.0, 3.0])
def test_error(spread):
    q, k, v = outlying(spread=spread)
    exact = reference(q, k, v)
    methods = {
        "bf16": attend, "FP8 as FlashAttention 3 has it": plain_fp8,
        "the same, smoothed around it": lambda *qkv: attend_around_fp8(*qkv, fp8_kernel_plain),
        **{f"int8 scores, {pv} values": lambda *qkv, pv=pv: attend_8bit_plain(*qkv, pv) for pv in PV},
    }  # fmt: skip
    errors = {name: relative_error(function(q, k, v), exact) for name, function in methods.items()}
    for name, function in methods.items():
        print(f"{name:<32} relative error {errors[name]:6.2%}, cosine {cosine(function(q, k, v), exact):.5f}")
    for pv in ("bf16", "int8"):
        assert errors[f"int8 scores, {pv} values"] < 0.03 / 1.5
        assert cosine(methods[f"int8 scores, {pv} values"](q, k, v), exact) > 0.999
    assert errors["int8 scores, fp8 values"] < 0.04  # FP8's three bits, of probabilities and of white values alone
    assert errors["the same, smoothed around it"] < errors["FP8 as FlashAttention 3 has it"] / 4


def test_error_on_the_demo():
    """Queries, keys and values of a trained model: each block of both experts, at the first step of its turn."""
    pipe = Pipeline.from_pretrained("demo", precision=Precision("bf16", "torch"), placement=Placement("cpu"))
    request = pipe.resolve(pipe.request("a red circle moving left", seed=3, num_steps=2, shift=3.0))
    get, taken = pipe.experts.get, {}

    def listening(name, loras=()):
        model = get(name, loras)
        for number, block in enumerate(model.blocks):

            def taking(*qkv, place=(name, number), exact=block.self_attn.attend):
                taken.setdefault(place, [x.clone() for x in qkv])
                return exact(*qkv)

            block.self_attn.attend = taking
        return model

    pipe.experts.get = listening
    pipe.denoise(request, Reporter())
    assert {name for name, _ in taken} == set(request.spec.experts)
    for pv in PV:
        made = [(attend_8bit_plain(*qkv, pv), reference(*qkv)) for qkv in taken.values()]
        errors, cosines = [relative_error(*pair) for pair in made], [cosine(*pair) for pair in made]
        print(f"int8 scores, {pv} values, {len(made)} blocks: relative error {max(errors):.2%} at most, "
              f"{sum(errors) / len(errors):.2%} in the mean; cosine {min(cosines):.5f} at least")  # fmt: skip
        assert max(errors) < 0.03
        assert min(cosines) > 0.999


@pytest.mark.parametrize("pv", PV)
@pytest.mark.parametrize(("length", "keys", "dim"), [(37, 137, 32), (130, 256, 64), (20, 70, 32)])
def test_kernel(forced, device, pv, length, keys, dim):
    q, k, v = outlying(length=max(length, keys), heads=2, dim=dim, batch=2)
    packed = torch.cat((k[:, :keys], v[:, :keys]), dim=2).to(device)  # views with gaps, as a packed product's are
    q, (k, v) = q[:, :length].to(device), packed.chunk(2, dim=2)
    plain, ours, exact = attend_8bit_plain(q, k, v, pv), attend_8bit(q, k, v, pv), reference(q, k, v)
    assert (ours.shape, ours.dtype) == (q.shape, q.dtype)
    print(f"{pv}: to the plain form {relative_error(ours, plain):.2e}; "
          f"to exact {relative_error(ours, exact):.2e}, the plain form {relative_error(plain, exact):.2e}")  # fmt: skip
    # Scores in another order of sums may round to the next probability; FP8 in the interpreter loses carries.
    assert relative_error(ours, plain) < (0.06 if pv == "fp8" and device.type == "cpu" else 0.01)


def test_backend():
    q, k, v = outlying(length=70)
    assert torch.equal(BACKENDS["int8"].find()(q, k, v), attend_8bit_plain(q, k, v, "int8"))
    assert torch.equal(BACKENDS["int8-bf16"].find()(q, k, v), attend_8bit_plain(q, k, v, "bf16"))


@pytest.mark.parametrize("kind", [torch.int8, FP8], ids=str)
def test_values_as_the_kernel_wants_them(forced, device, kind):
    v = outlying(length=150, heads=2, dim=32, batch=2)[2].to(device)[:, 3:]
    (ours, scale, mean), (plain, plain_scale, plain_mean) = _transpose_and_quantize(v, kind), quantize_v(v, kind)
    assert ours.stride(1) == 1
    assert (ours[:, v.shape[1] :].float() == 0).all(), "what lies beyond the last token"
    assert torch.allclose(scale, plain_scale, rtol=1e-5)
    assert torch.allclose(mean, plain_mean, atol=1e-6)
    differing = (ours[:, : v.shape[1]].float() != plain.float()).double().mean().item()
    print(f"{kind}: {differing:.2%} differ")
    assert differing < (0.06 if kind == FP8 and device.type == "cpu" else 0.002)  # FP8 in the interpreter loses carries


def test_statistics(forced, device):
    x = outlying(length=1500, heads=2, dim=32, batch=2)[1].to(device)[:, 3:]
    exact = x.double()
    for ours, theirs in zip(
        statistics(x), (exact.mean(1), exact.square().mean(1), exact.amax(1), exact.amin(1)), strict=True
    ):
        assert ours.dtype == torch.float32
        assert torch.allclose(ours.double(), theirs[:, None], rtol=1e-5, atol=1e-5)


# Of what Hopper's kernel is tried on: less than a tile of keys, more than one, an odd number of tiles, and more blocks
# than there is room for at a time.
SHAPES = pytest.mark.parametrize(
    ("length", "keys", "dim"), [(300, 1100, 128), (64, 20, 64), (65, 129, 64), (9, 1500, 64)]
)


def uneven(length, keys, dim):
    """q, k, v with blocks of keys that are far below the others, and far above; k and v are views of one tensor."""
    q, k, v = outlying(length=max(length, keys), heads=3, dim=dim, batch=2)
    k[:, 256:512] *= 0.01
    k[:, 1000:1100] *= 30
    packed = torch.cat((k[:, :keys], v[:, :keys]), dim=2)
    return q[:, :length], *packed.chunk(2, dim=2)


@SHAPES
def test_hopper(monkeypatch, forced, length, keys, dim):
    monkeypatch.setattr(attention_8bit, "attention_hopper", attention_on_cpu())
    monkeypatch.setattr(attention_8bit, "FORM", attention_8bit.HOPPER)
    q, k, v = uneven(length, keys, dim)
    with torch.inference_mode():
        ours, plain, exact = attend_8bit(q, k, v), attend_8bit_plain(q, k, v), reference(q, k, v)
    print(f"to the plain form {relative_error(ours, plain):.2e}; to exact {relative_error(ours, exact):.2e}, "
          f"the plain form {relative_error(plain, exact):.2e}")  # fmt: skip
    assert relative_error(ours, plain) < 0.005


@pytest.mark.gpu
@pytest.mark.skipif(
    not (attention_hopper.GLUON and torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)),
    reason="no Hopper here",
)
@SHAPES
def test_hopper_on_the_chip(length, keys, dim):
    """The same whole numbers through the kernel and through its stand-in. (To the plain form it would say less here:
    the chip rotates in tf32, and one step of an INT8 key ten times as large as the others moves a softmax.)"""
    q, k, v = (x.cuda() for x in uneven(length, keys, dim))
    with torch.inference_mode():
        q8, q_scale, k8, k_scale = prepare(q, k, attention_hopper.KEYS)
        values, v_scale, v_mean = _transpose_and_quantize(v, torch.int8, ordered=True)
        numbers = (q8, k8, values.permute(0, 2, 3, 1), q_scale, k_scale, v_scale, v_mean)
        expected = torch.empty(q.shape, dtype=q.dtype)
        attention_on_cpu().attend(*(x.cpu() for x in numbers), expected)
        for _ in range(3):  # what races shows in one of them
            ours = torch.full_like(q, torch.nan)
            attention_hopper.attend(*numbers, ours)
            print(f"to the stand-in {relative_error(ours.cpu(), expected):.2e}")
            assert relative_error(ours.cpu(), expected) < 0.005


def test_hopper_waits(monkeypatch, forced):
    """The stand-in for the chip tells when a tile is overwritten too early, and of a wait in vain."""
    q, k, v = outlying(length=1200, heads=1, dim=64)
    module = attention_on_cpu()
    monkeypatch.setattr(attention_8bit, "attention_hopper", module)
    monkeypatch.setattr(attention_8bit, "FORM", attention_8bit.HOPPER)
    right = attend_8bit(q[:, :130], k, v)
    monkeypatch.setattr("gluon_on_cpu.SECONDS", 0.5)
    with monkeypatch.context() as patch:
        patch.setattr(module.mbarrier, "arrive", lambda barrier, pred=True: None)
        with pytest.raises(AssertionError, match="does not end"):
            attend_8bit(q[:, :130], k, v)
    wait = module.mbarrier.wait
    with monkeypatch.context() as patch:  # the fetching warp does not wait for the tiles to be free
        patch.setattr(module.mbarrier, "wait", lambda barrier, parity, **pred: None if pred else wait(barrier, parity))
        with pytest.raises(AssertionError, match=r"does not end|wrong"):  # or a barrier was two phases ahead
            assert relative_error(attend_8bit(q[:, :130], k, v), right) < 0.05, "wrong"
    assert torch.equal(attend_8bit(q[:, :130], k, v), right)
