"""Each fused operation against its plain form, on small odd shapes; and a whole small model."""

import pytest
import torch

from wan22.kernels import (
    dispatch,
    double_pixels,
    gelu,
    gelu_quantize,
    norm_modulate,
    norm_silu,
    qk_norm_rope,
    rms_norm,
)
from wan22.kernels.gated_residual import gated_residual, gated_residual_norm, gated_residual_norm_modulate
from wan22.model import TransformerConfig, WanTransformer

# numpy's, in the interpreter: 1 / ∞ is meant.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")

EPS = 1e-6
BF16_STEP = 2.0**-7  # one unit in the last place: Triton's interpreter cuts where a GPU rounds


@pytest.fixture
def draw(device):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, dtype=torch.float32, spread=1.0):
        return (torch.randn(shape, generator=generator) * spread).to(device, dtype)

    return draw


@pytest.fixture
def twin(monkeypatch):
    """An operation's plain form."""

    def run(function, *args):
        with monkeypatch.context() as context:
            context.setattr(dispatch, "MODE", "plain")
            return function(*args)

    return run


def check(name, ours, plain, relative=1e-6, absolute=2e-6):
    """Largest and mean error, and that none is beyond rounding."""
    ours, plain = (one if isinstance(one, tuple) else (one,) for one in (ours, plain))
    for a, b in zip(ours, plain, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        error = (a.double() - b.double()).abs()
        print(f"{name} {tuple(a.shape)} {a.dtype}: largest {error.max():.2e}, mean {error.mean():.2e}")
        step = {torch.bfloat16: BF16_STEP, torch.float8_e4m3fn: 2.0**-3}.get(a.dtype, relative)
        assert (error <= absolute + step * b.double().abs()).all()


@pytest.mark.parametrize(("width", "length", "batch"), [(5120, 3, 1), (72, 5, 2), (384, 2, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_norm_modulate(forced, draw, twin, width, length, batch, dtype):
    x = draw(batch, length, width, spread=3) + 50  # a mean that a careless variance would drown in
    modulation = draw(batch, 2, width)
    shift, scale = modulation[:, :1], modulation[:, 1:]
    args = (x, shift, scale, EPS, dtype)
    # A mean of 50 beside a spread of 3 leaves float32 sums 1e-5.
    check("norm_modulate", norm_modulate(*args), twin(norm_modulate, *args), absolute=5e-5)


@pytest.mark.parametrize(("width", "length", "batch"), [(5120, 2, 1), (72, 5, 2)])
@pytest.mark.parametrize("gated", [True, False])
def test_residuals(forced, draw, twin, width, length, batch, gated):
    x, y = draw(batch, length, width, spread=4), draw(batch, length, width, dtype=torch.bfloat16)
    modulation = draw(batch, 3, width)
    gate, shift, scale = (modulation[:, i : i + 1] for i in range(3))
    gate = gate if gated else None
    weight, bias = draw(width), draw(width)
    for function, more in (
        (gated_residual, ()),
        (gated_residual_norm, (weight, bias, EPS, torch.bfloat16)),
        (gated_residual_norm_modulate, (shift, scale, EPS, torch.bfloat16)),
    ):
        plain = twin(function, x.clone(), y, gate, *more)
        ours = function(given := x.clone(), y, gate, *more)
        check(function.__name__, ours, plain, absolute=2e-5)
        assert (ours if function is gated_residual else ours[0]).data_ptr() == given.data_ptr(), "not in place"


def test_residuals_leave_x_alone_under_gradients(draw):
    x, y, gate = draw(1, 3, 8), draw(1, 3, 8).requires_grad_(), draw(1, 1, 8)
    before = x.clone()
    gated_residual(x, y, gate).sum().backward()
    assert torch.equal(x, before)
    assert y.grad is not None


@pytest.mark.parametrize(("heads", "head_dim", "length", "batch"), [(40, 128, 2, 1), (3, 12, 5, 2), (2, 32, 7, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_qk_norm_rope(forced, draw, twin, heads, head_dim, length, batch, dtype):
    width = heads * head_dim
    q, k, _ = draw(batch, length, 3 * width, dtype=dtype, spread=2).chunk(3, dim=-1)  # views of a packed product
    angles = draw(length, head_dim // 2)
    args = (q, k, draw(width), draw(width), (angles.cos(), angles.sin()), heads, EPS)
    ours = qk_norm_rope(*args)
    assert all(x.is_contiguous() and x.shape == (batch, length, heads, head_dim) for x in ours)
    check("qk_norm_rope", ours, twin(qk_norm_rope, *args), absolute=2e-5 if dtype == torch.bfloat16 else 5e-6)
    args = (k, draw(width), EPS)
    check("rms_norm", rms_norm(*args), twin(rms_norm, *args), absolute=5e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gelu(forced, draw, twin, dtype):
    x = draw(2, 3, 700, dtype=dtype, spread=4)
    plain = twin(gelu, x)
    check("gelu", gelu(x.clone()), plain)


@pytest.mark.parametrize("channels", [96, 24, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_norm_silu(forced, draw, twin, channels, dtype):
    """Into the later frames of a buffer, as before a convolution; a pixel of nothing stays nothing."""
    x = draw(1, channels, 2, 3, 5, dtype=dtype, spread=3)
    x[:, :, 1, 2, 4] = 0
    x = x.contiguous(memory_format=torch.channels_last_3d)
    rooms = [torch.full((1, channels, 4, 3, 5), 7.0, dtype=dtype, device=x.device) for _ in range(2)]
    rooms = [room.contiguous(memory_format=torch.channels_last_3d) for room in rooms]
    gamma = draw(channels)
    norm_silu(x, gamma, rooms[0][:, :, 2:])
    twin(norm_silu, x, gamma, rooms[1][:, :, 2:])
    check("norm_silu", rooms[0], rooms[1], absolute=5e-6)
    assert (rooms[0][:, :, :2] == 7).all()
    assert (rooms[0][:, :, 3, 2, 4] == 0).all()


def last(x):
    return x.contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("channels", [96, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("summed", [True, False])
@pytest.mark.parametrize("over", ["x", "y", "none"])
@pytest.mark.parametrize("normed", [True, False])
def test_norm_silu_of_a_sum(forced, draw, twin, channels, dtype, summed, over, normed):
    """A bias and a residual block's sum, over what it is made of or not kept, in both dtypes."""
    x, y = (last(draw(1, channels, 2, 3, 5, dtype=kind, spread=3)) for kind in (torch.float32, dtype))
    gamma, bias = draw(channels) if normed else None, draw(channels, dtype=dtype)
    if over == "y" and not summed:
        pytest.skip("there is no y")
    found = []
    for run in (norm_silu, lambda *args: twin(norm_silu, *args)):
        own = {"x": last(x.clone()), "y": last(y.clone())}
        out = last(torch.empty_like(x, dtype=dtype))
        run(own["x"], gamma, out, own["y"] if summed else None, bias, own.get(over))
        untouched = [name for name, before in (("x", x), ("y", y)) if torch.equal(own[name], before)]
        assert untouched == [name for name in ("x", "y") if name != over]
        found.append((out, own["x"], own["y"]))
    check("norm_silu of a sum", *found, absolute=5e-6)


@pytest.mark.parametrize(("channels", "each", "width"), [(96, 1, 5), (6, 2, 7), (16, 2, 4)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("pending", [True, False])
def test_double_pixels(forced, draw, twin, channels, each, width, dtype, pending):
    """More pixels than one program's; rows, frames and frames of two where they belong."""
    x = last(draw(1, each * channels, 3, 3, width, spread=3))
    y, bias = last(draw(1, each * channels, 3, 3, width, dtype=dtype)), draw(each * channels)
    y, bias = (y, bias) if pending else (None, None)
    args = (x, y, bias, each, dtype)
    ours = double_pixels(*args)
    check("double_pixels", ours, twin(double_pixels, *args))
    assert ours.is_contiguous(memory_format=torch.channels_last)
    whole = x if y is None else x + bias.view(-1, 1, 1, 1) + y.float()
    for frame in range(3 * each):
        part = whole[0, frame % each * channels : (frame % each + 1) * channels, frame // each]
        expected = part.repeat_interleave(2, 1).repeat_interleave(2, 2).to(dtype)
        check("a frame", ours[frame].contiguous(), expected)


def test_gelu_quantize(forced, draw, twin):
    x = draw(5, 300, dtype=torch.bfloat16, spread=4)
    x[3] = -30  # whose GELU is all but zero
    ours, plain = gelu_quantize(x), twin(gelu_quantize, x)
    check("scales", ours[1], plain[1])
    assert ours[0].dtype == torch.float8_e4m3fn
    exact = torch.nn.functional.gelu(x.double(), approximate="tanh")
    error = [((y.double() * scale.double() - exact).norm() / exact.norm()).item() for y, scale in (ours, plain)]
    differing = (ours[0].float() != plain[0].float()).double().mean().item()
    print(f"relative error {error[0]:.2e}, plain form {error[1]:.2e}; {differing:.1%} differ")
    assert error[1] < 0.03
    # Triton's interpreter loses the carry where rounding reaches the next power of two; a GPU does not.
    assert differing < (0.06 if x.device.type == "cpu" else 0.002)


def test_gradients_and_settings_choose_the_plain_form(monkeypatch, draw):
    x = draw(1, 2, 16).requires_grad_()
    monkeypatch.setattr(dispatch, "MODE", "triton")
    assert not dispatch.use_triton(x)
    with torch.no_grad():
        assert dispatch.use_triton(x) or dispatch.triton is None
    monkeypatch.setattr(dispatch, "MODE", "plain")
    with torch.no_grad():
        assert not dispatch.use_triton(x)
    monkeypatch.setattr(dispatch, "MODE", "fast")
    with pytest.raises(ValueError, match="WAN22_KERNELS=fast"):
        dispatch.use_triton(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_model(forced, draw, twin, device, dtype):
    """Every kernel in its place, a batch of two, against the plain model."""
    config = TransformerConfig(dim=48, ffn_dim=80, num_heads=2, num_layers=2, freq_dim=16, text_dim=8, text_len=5)
    model = WanTransformer(config, dtype).to(device).requires_grad_(False)
    model.init_weights(torch.Generator().manual_seed(0)) if device.type == "cpu" else model.init_weights()
    torch.nn.init.normal_(model.head.head.weight, std=0.1)
    latents, timestep, context = draw(2, 16, 1, 4, 6), torch.tensor([900.0, 100.0], device=device), draw(2, 3, 8)

    def velocity():
        return model(latents, timestep, model.embed_context(context))

    plain, ours = twin(velocity), velocity()
    difference = (ours - plain).abs()
    print(f"velocity of size {plain.std():.2f}: largest {difference.max():.2e}, mean {difference.mean():.2e}")
    assert difference.max() < (5e-2 if dtype == torch.bfloat16 else 2e-5) * plain.abs().max()
