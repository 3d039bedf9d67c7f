"""Tiles of the VAE are the whole, to rounding: at odd sizes, at every stage, through time, and after a failure."""

import math
from dataclasses import replace

import pytest
import torch

from wan22 import vae_sizes
from wan22.config import RunError, data_dir
from wan22.files.tensor_files import Safetensors
from wan22.sizes import Sizes
from wan22.vae import VideoVAE, steps_of
from wan22.vae_sizes import cuts, decode_terms, finer, interval, with_halo

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vae(tiny):
    return VideoVAE(tiny, CPU)


@pytest.fixture(scope="module")
def latents():
    """Wider than two halos and a tile, so that tiles are smaller than the whole; odd, so that they differ in size."""
    return torch.randn(16, 2, 7, 33, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def whole(vae, latents):
    return list(vae.decode(latents))


@pytest.fixture(scope="module")
def clip():
    return torch.randn(16, 4, 6, 10, generator=torch.Generator().manual_seed(1))


def test_longer_chunks_are_the_same(vae, clip):
    """Two latent frames at a time, whole and in tiles; the last chunk is a shorter one; and diffusers' own decode."""
    whole = torch.cat(list(vae.decode(clip)))
    theirs = vae.model.decode(clip[None] / vae.inverse_std + vae.mean, return_dict=False)[0][0].transpose(0, 1)
    assert (whole - theirs).abs().max() <= 1e-5
    try:
        vae.chunk = 2
        chunks = list(vae.decode(clip))
        assert [len(chunk) for chunk in chunks] == [1, 8, 4]
        assert (torch.cat(chunks) - whole).abs().max() <= 1e-5
        assert (torch.cat(list(vae.decode(clip, (1, 2)))) - whole).abs().max() <= 1e-4
    finally:
        vae.chunk = 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grid", [(1, 1), (1, 2)])
def test_everything_lies_as_the_kernel_wants_it(tiny, clip, monkeypatch, dtype, grid):
    """Else a GPU would run the plain form: right, and slow. The same numbers, whatever the layout."""
    from wan22 import vae_decoder
    from wan22.kernels import double_pixels
    from wan22.kernels.norm_silu import norm_silu, rows_of_channels

    seen, doubled = [], []
    expected = torch.cat(list(VideoVAE(tiny, CPU, dtype).decode(clip, grid)))
    exact = torch.cat(list(VideoVAE(tiny, CPU).decode(clip)))
    monkeypatch.setitem(vae_decoder.LAYOUT, "cpu", torch.channels_last_3d)

    def watched(x, gamma, out, y=None, bias=None, total=None):
        others = [one for one in (out, y, total) if one is not None]
        seen.append((x.shape[2], rows_of_channels(x), all(map(rows_of_channels, others))))
        norm_silu(x, gamma, out, y, bias, total)

    def watched_too(x, y, bias, each, dtype):
        doubled.append(all(rows_of_channels(one) for one in (x, y) if one is not None))
        out = double_pixels(x, y, bias, each, dtype)
        assert out.is_contiguous(memory_format=torch.channels_last)
        return out

    monkeypatch.setattr(vae_decoder, "norm_silu", watched)
    monkeypatch.setattr(vae_decoder, "double_pixels", watched_too)
    frames = torch.cat(list(VideoVAE(tiny, CPU, dtype).decode(clip, grid)))
    if dtype == torch.float32:
        assert (frames - expected).abs().max() < 1e-5
    else:
        assert psnr(frames, exact) >= 50  # between two roundings, a largest difference is chance
    assert len(seen) > 80
    assert all(x and out for _, x, out in seen)
    assert len(doubled) >= 9
    assert all(doubled)
    assert {frames for frames, _, _ in seen} == ({1, 2, 4} if dtype == torch.float32 else {1, 2, 4, 8})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_biases_that_wait(tiny, clip, monkeypatch, dtype, layout):
    """As on a GPU: biases are added by the kernel that comes next. Here by the plain forms; whole, and in tiles, which
    read the middle block's output more than once."""
    from wan22 import vae_decoder

    exact = torch.cat(list(VideoVAE(tiny, CPU).decode(clip)))
    monkeypatch.setitem(vae_decoder.LAYOUT, "cpu", layout)
    late = []
    monkeypatch.setattr(vae_decoder, "use_triton", lambda weight: not late.append(weight))
    for grid in ((1, 1), (1, 2)):
        frames = torch.cat(list(VideoVAE(tiny, CPU, dtype).decode(clip, grid)))
        if dtype == torch.float32:
            assert (frames - exact).abs().max() < 1e-4
        else:
            assert psnr(frames, exact) >= 50
    assert len(late) > 100


def psnr(a, b):
    return 10 * math.log10(4 / (a - b).square().mean().item())


@pytest.mark.parametrize("demo", [False, True])
def test_bf16(tiny, clip, demo):
    """PSNR to float32, of a VAE of random numbers and of a trained one."""
    demo_vae = data_dir("demo") / "Wan2.1_VAE.safetensors"
    if demo and not demo_vae.exists():
        pytest.skip("no demo here")
    checkpoint = replace(tiny, vae=Safetensors(demo_vae)) if demo else tiny
    exact = torch.cat(list(VideoVAE(checkpoint, CPU).decode(clip)))
    rounded = torch.cat(list(VideoVAE(checkpoint, CPU, torch.bfloat16).decode(clip)))
    found = psnr(exact, rounded)
    print(f"{'demo' if demo else 'tiny'}: PSNR {found:.1f} dB")
    assert rounded.dtype == torch.float32
    assert 50 <= found < 90


def test_chunks_get_shorter_first(tiny, clip, monkeypatch):
    """bf16 decodes two latent frames at a time; where that is too much, one; what is out is not told again."""
    rounded = VideoVAE(tiny, CPU, torch.bfloat16)
    whole, local, calls, said = torch.cat(list(rounded.decode(clip))), VideoVAE._local, iter(range(99)), []

    def fails_once(self, *args):
        if next(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return local(self, *args)

    monkeypatch.setattr(VideoVAE, "_local", fails_once)
    chunks = list(rounded.decode(clip, warn=said.append))
    assert [len(chunk) for chunk in chunks] == [1, 8, 4]
    assert said == ["out of memory while decoding: going on frame by frame"]
    assert (torch.cat(chunks) - whole).abs().max() <= 1e-2


@pytest.mark.parametrize("grid", [(1, 3), (2, 2)])
def test_tiles_are_exact(vae, latents, whole, grid):
    tiled = list(vae.decode(latents, grid))
    assert [chunk.shape for chunk in tiled] == [chunk.shape for chunk in whole] == [(1, 3, 56, 264), (4, 3, 56, 264)]
    difference = max((ours - theirs).abs().max().item() for ours, theirs in zip(tiled, whole, strict=True))
    print(f"{grid}: largest difference {difference:.1e}")
    assert difference <= 1e-4


def test_the_halo_is_needed(vae, latents, whole):
    """One latent less on a side and the numbers change: the halo is no larger than it must be by much."""
    lo, hi = with_halo(15, 17, 33)
    assert (lo, hi) == (2, 30)
    middle = vae._middle(vae.model.post_quant_conv(latents[None, :, :1] / vae.inverse_std + vae.mean), vae_cache())

    def cut(margin):
        with torch.inference_mode():
            part = vae._local(middle[..., lo + margin : hi - margin], vae_cache(), True)
        return part[..., 8 * (15 - lo - margin) : 8 * (17 - lo - margin)]

    assert (cut(0) - whole[0][..., 120:136]).abs().max() <= 1e-6
    assert (cut(5) - whole[0][..., 120:136]).abs().max() > 1e-6


def vae_cache():
    from wan22.vae import Cache

    return Cache()


def test_the_halo_comes_from_the_architecture(vae):
    """What the plan counts with, without torch, is what the model is."""
    assert tuple(steps_of(vae.model.decoder)) == vae_sizes.STEPS
    assert with_halo(50, 60, 160) == (37, 73)
    assert with_halo(0, 10, 160) == (0, 23)


def test_every_stage():
    """The reach behind the middle block, stage by stage, in pixels of that stage."""
    reach, steps = [], list(vae_sizes.STEPS)
    for place in [place for place, step in enumerate(steps) if step == 0] + [len(steps)]:
        start, stop = interval(800, 808, steps[:place])
        scale = 2 ** steps[:place].count(0)
        reach.append(max(800 // scale - start, stop - 808 // scale))
    assert reach == [8, 11, 13, 13]


def test_an_impulse_reaches_no_further(vae):
    """One changed latent changes pixels within the halo, and none beyond."""
    width, at = 40, 20
    with torch.inference_mode():
        zeros = torch.zeros(1, vae.model.decoder.mid_block.resnets[0].conv1.out_channels, 1, 3, width)
        impulse = zeros.clone()
        impulse[..., at] = 1
        changed = (vae._local(impulse, vae_cache(), True) != vae._local(zeros, vae_cache(), True)).flatten(0, 2).any(0)
    columns = changed.nonzero().flatten().tolist()
    reached = [column for column in range(8 * width) if with_halo(column // 8, column // 8 + 1, width)[0] <= at
               < with_halo(column // 8, column // 8 + 1, width)[1]]  # fmt: skip
    assert columns[0] >= reached[0]
    assert columns[-1] <= reached[-1]
    assert len(columns) > 16 * 8  # it does reach far


def test_after_running_out_the_rest_is_right(vae, latents, whole, monkeypatch):
    """Chunks that are out stay out; those that follow are the same."""
    local, calls = VideoVAE._local, iter(range(99))

    def fails_once(self, *args):
        if next(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return local(self, *args)

    monkeypatch.setattr(VideoVAE, "_local", fails_once)
    said = []
    chunks = list(vae.decode(latents, warn=said.append))
    assert len(chunks) == len(whole)
    assert said == ["out of memory while decoding: going on in 1 x 2 tiles"]
    assert max((ours - theirs).abs().max().item() for ours, theirs in zip(chunks, whole, strict=True)) <= 1e-4

    def fails(self, *args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(VideoVAE, "_local", fails)
    with pytest.raises(RunError, match="smallest tiles"):
        list(vae.decode(latents))


def test_grids():
    assert cuts(7, 3) == [(0, 2), (2, 4), (4, 7)]
    assert finer((1, 1), (16, 21, 90, 160)) == (1, 2)
    assert finer((1, 2), (16, 21, 90, 160)) == (2, 2)
    assert finer((1, 1), (16, 1, 4, 4)) is None
    grid, shape, sums = (1, 1), (16, 21, 90, 160), []
    while grid:
        sums.append(sum(decode_terms(shape, Sizes.published().vae_width, grid).values()))
        grid = finer(grid, shape)
    assert sums == sorted(sums, reverse=True)
    print([f"{nbytes / 2**30:.1f}" for nbytes in sums])
