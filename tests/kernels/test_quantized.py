"""8-bit rows out of every operation, and their products: each kernel against its plain form, both against float32."""

import pytest
import torch
import torch.nn.functional as F

from wan22.kernels import dispatch, gelu, norm_modulate, quantize_rows
from wan22.kernels.gated_residual import gated_residual_norm, gated_residual_norm_modulate
from wan22.kernels.product_8bit import product_8bit, product_8bit_plain
from wan22.kernels.quantize_rows import LARGEST, Quantized, quantize_rows_plain

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")
EPS = 1e-6
KINDS = [torch.float8_e4m3fn, torch.int8]
# What rounding costs: fp8 three bits of each number, int8 even steps of rows whose largest is up to ten spreads.
ERROR = {torch.float8_e4m3fn: 0.03, torch.int8: 0.02}


@pytest.fixture
def draw(device):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, dtype=torch.float32, spread=1.0):
        return (torch.randn(shape, generator=generator) * spread).to(device, dtype)

    return draw


@pytest.fixture
def plainly(monkeypatch):
    def run(function, *args):
        with monkeypatch.context() as context:
            context.setattr(dispatch, "MODE", "plain")
            return function(*args)

    return run


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def check(name, ours, plain, exact):
    """Scales to rounding, values but for a few that lay at a tie, and no further from float32 than the plain form."""
    assert isinstance(ours, Quantized)
    assert (ours.values.shape, ours.values.dtype, ours.scale.shape) == (plain.values.shape, plain.values.dtype,
                                                                         plain.scale.shape)  # fmt: skip
    kind = ours.values.dtype
    assert torch.allclose(ours.scale, plain.scale, rtol=2e-5)
    differing = (ours.values.float() != plain.values.float()).double().mean().item()
    errors = [relative(rows.float(), exact) for rows in (ours, plain)]
    largest = (ours.float().double() - exact.double()).abs().max().item()
    print(f"{name} {kind}: error {errors[0]:.2e}, plain form {errors[1]:.2e}, largest {largest:.2e}; "
          f"{differing:.1%} differ")  # fmt: skip
    assert errors[1] < ERROR[kind]
    # Triton's interpreter loses the carry where FP8's rounding reaches the next power of two; a GPU does not.
    lossy = kind == torch.float8_e4m3fn and ours.values.device.type == "cpu"
    assert errors[0] < (4 if lossy else 1.05) * errors[1]
    assert differing < (0.06 if lossy else 0.002)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("width", "length", "batch"), [(5120, 2, 1), (72, 5, 2)])
def test_operations(forced, draw, plainly, kind, width, length, batch):
    x, y = draw(batch, length, width, spread=4), draw(batch, length, width, dtype=torch.bfloat16)
    gate, shift, scale = draw(batch, 3, width).split(1, dim=1)
    weight, bias = draw(width), draw(width)
    for function, args in (
        (norm_modulate, (shift, scale, EPS)),
        (gated_residual_norm, (y, gate, weight, bias, EPS)),
        (gated_residual_norm_modulate, (y, None, shift, scale, EPS)),
    ):
        exact = plainly(function, x.clone(), *args, torch.float32)
        plain, ours = plainly(function, x.clone(), *args, kind), function(x.clone(), *args, kind)
        if function is not norm_modulate:
            assert torch.allclose(ours[0], plain[0], atol=1e-5)
            ours, plain, exact = ours[1], plain[1], exact[1]
        check(function.__name__, ours, plain, exact)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_gelu_and_plain_rows(forced, draw, plainly, kind):
    x = draw(3, 5, 300, dtype=torch.bfloat16, spread=1)
    x[0, 3] = -30  # whose GELU is all but zero
    check("quantize_rows", quantize_rows(x, kind), plainly(quantize_rows, x, kind), x)
    if kind == torch.float8_e4m3fn:
        check("gelu", gelu(x, kind), plainly(gelu, x, kind), F.gelu(x.float(), approximate="tanh"))
    else:  # half of GELU's numbers are next to nothing beside the row's largest
        ours, plain = gelu(x, kind), plainly(gelu, x, kind)
        assert torch.allclose(ours.float(), plain.float(), atol=plain.scale.max().item())


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_rows_of_zeros_and_of_one_number(kind):
    x = torch.zeros(3, 16)
    x[1, 4], x[2] = -5.0, 1e-30
    rows = quantize_rows_plain(x, kind)
    assert torch.isfinite(rows.float()).all()
    assert torch.equal(rows.float()[:2], x[:2])
    assert rows.values[1, 4].float() == -LARGEST[kind]


def test_quantizing_again_changes_nothing():
    """What lies in a file as row-wise fp8 comes out of it as the same numbers, though it went through float32."""
    once = quantize_rows_plain(torch.randn(64, 200), torch.float8_e4m3fn)
    twice = quantize_rows_plain(once.float(), torch.float8_e4m3fn)
    assert torch.equal(once.values.view(torch.uint8), twice.values.view(torch.uint8))
    assert torch.allclose(once.scale, twice.scale, rtol=1e-6)


def test_parts_of_rows():
    rows = quantize_rows_plain(torch.randn(2, 10, 32), torch.int8)
    parts = rows.split(4, dim=1)
    assert [part.shape[1] for part in parts] == [4, 4, 2]
    assert torch.equal(torch.cat([part.float() for part in parts], dim=1), rows.float())


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("batch", "length", "inner", "outer"), [(2, 35, 80, 48), (1, 70, 128, 96)])
def test_product(forced, draw, kind, batch, length, inner, outer):
    x, weight, bias = draw(batch, length, inner, spread=2), draw(outer, inner), draw(outer, dtype=torch.bfloat16)
    rows, columns = quantize_rows_plain(x, kind), quantize_rows_plain(weight, kind)
    exact = F.linear(x, weight, bias.float())
    ours, plain = product_8bit(rows, *columns, bias), product_8bit_plain(rows, *columns, bias)
    assert (ours.shape, ours.dtype) == (exact.shape, torch.bfloat16)
    error = (ours.float() - plain.float()).abs()
    print(f"{kind}: to the plain form largest {error.max():.2e}, mean {error.mean():.2e}; to float32, relative "
          f"{relative(ours, exact):.2e}, the plain form {relative(plain, exact):.2e}")  # fmt: skip
    assert relative(ours, plain) < 5e-3  # bf16, cut by the interpreter where a GPU rounds
    assert relative(plain, exact) < (0.05 if kind == torch.float8_e4m3fn else 0.02)
