"""How far two videos are apart: the measures against other ways to compute them, the report, the plot."""

import json
import math

import numpy as np
import pytest
from PIL import Image
from test_video import clip, save

from wan22 import cli
from wan22.compare import C1, C2, Series, compare, luma, plot, psnr, ssim
from wan22.config import RequestError


def ssim_as_written(a, b):
    """Wang et al. 2004, equations 14 to 16 and 13, one window after another in float64."""
    places = np.arange(11) - 5
    window = np.exp(-(places[:, None] ** 2 + places[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    found = []
    for top in range(a.shape[0] - 10):
        for left in range(a.shape[1] - 10):
            x, y = (one[top : top + 11, left : left + 11].astype(np.float64) for one in (a, b))
            mean_x, mean_y = (window * x).sum(), (window * y).sum()
            var_x, var_y = (window * (x - mean_x) ** 2).sum(), (window * (y - mean_y) ** 2).sum()
            covariance = (window * (x - mean_x) * (y - mean_y)).sum()
            found.append((2 * mean_x * mean_y + C1) * (2 * covariance + C2)
                         / ((mean_x**2 + mean_y**2 + C1) * (var_x + var_y + C2)))  # fmt: skip
    return np.mean(found)


def noisy(frames, strength, seed=0):
    noise = np.random.default_rng(seed).normal(0, strength, frames.shape)
    return np.clip(frames + noise, 0, 255).astype(np.uint8)


# The measures ------------------------------------------------------------------------------------------------------


def test_ssim_of_flat_pictures_by_hand():
    # No variance: what is left is (2 · 100 · 150 + C1) / (100² + 150² + C1), with C1 = (0.01 · 255)² = 6.5025.
    flat = [np.full((16, 20), value, np.float32) for value in (100, 150)]
    assert ssim(*flat) == pytest.approx(30006.5025 / 32506.5025, abs=1e-6)
    assert ssim(flat[0], flat[0]) == 1


@pytest.mark.parametrize("shape", [(11, 11), (43, 37), (75, 12)])
def test_ssim_as_the_paper_writes_it(shape):
    rng = np.random.default_rng(1)
    a = rng.uniform(0, 255, shape).astype(np.float32)
    for b in (np.clip(a + rng.normal(0, 20, shape), 0, 255).astype(np.float32), 255 - a, a * 0.2 + 200):
        expected = ssim_as_written(a, b)
        assert ssim(a, b) == pytest.approx(expected, abs=1e-5)
        assert ssim(b, a) == pytest.approx(expected, abs=1e-5)
    assert ssim(a, a) == 1
    bright = np.full(shape, 250, np.float32) + rng.normal(0, 0.5, shape).astype(np.float32)  # hard for float32
    other = bright + rng.normal(0, 0.5, shape).astype(np.float32)
    assert ssim(bright, other) == pytest.approx(ssim_as_written(bright, other), abs=1e-5)


def test_psnr_by_hand():
    assert psnr(1) == pytest.approx(48.1308, abs=1e-4)  # 20 log10 255
    assert psnr(255**2) == 0
    assert psnr(0) == math.inf


def test_luma_of_white_and_of_each_primary():
    frame = np.array([[[255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255]]], np.uint8)
    assert luma(frame)[0] == pytest.approx([255, 54.213, 182.376, 18.411], abs=1e-3)


# Videos ------------------------------------------------------------------------------------------------------------


def test_frames_that_differ_by_a_known_amount(tmp_path):
    frames = np.full((3, 32, 48, 3), 100, np.uint8)
    other = frames.copy()
    other[1] += 2
    other[2, 0, 0, 0] = 110
    result = compare(save(tmp_path / "a", frames), save(tmp_path / "b", other))
    level, alike = result.series
    assert level.values == pytest.approx((math.inf, psnr(4), psnr(100 / (32 * 48 * 3))))
    assert level.overall == pytest.approx(psnr((4 + 100 / (32 * 48 * 3)) / 3))
    assert (level.worst, result.largest, result.shape, result.identical) == (1, 10, (3, 32, 48), False)
    assert alike.values[0] == 1
    assert alike.values[1] == pytest.approx((2 * 100 * 102 + C1) / (100**2 + 102**2 + C1), abs=1e-5)


@pytest.mark.parametrize("name", ["x.mp4", "x.gif", "x"])
def test_a_file_and_itself(tmp_path, capsys, name):
    path = save(tmp_path / name, clip(6))
    result = compare(path, path)
    assert result.identical
    assert result.series[1].overall == 1
    assert cli.main(["compare", str(path), str(path)]) == 0
    out = capsys.readouterr().out
    assert "PSNR                     identical     identical\n" in out
    assert cli.main(["compare", str(path), str(path), "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert table["identical"] is True
    assert table["psnr"]["overall"] is None
    assert table["ssim"]["frames"] == [1.0] * 6


def test_one_kind_of_file_against_another(tmp_path):
    frames = clip(9, 128, 96)
    sharp = compare(save(tmp_path / "x", frames), save(tmp_path / "x.mp4", frames))
    assert sharp.series[0].overall > 30
    assert len(sharp.series[0].values) == 9
    assert len(compare(save(tmp_path / "y", frames), save(tmp_path / "x.gif", frames)).series[1].values) == 9


def test_what_does_not_compare_names_both(tmp_path, capsys):
    clips = (("a", 5, 96), ("s", 4, 96), ("w.gif", 5, 112))
    a, short, wide = (save(tmp_path / name, clip(count, width)) for name, count, width in clips)
    with pytest.raises(RequestError, match=r"lengths differ: .*a has 5 frames, .*s has 4 frames"):
        compare(a, short)
    with pytest.raises(RequestError, match=r"sizes differ: .*a is 96x64, .*w\.gif is 112x64"):
        compare(a, wide)
    with pytest.raises(RequestError, match="smaller than SSIM's window"):
        compare(*[save(tmp_path / name, np.zeros((1, 8, 32, 3), np.uint8)) for name in ("t", "u")])
    with pytest.raises(RequestError, match="do not compare"):
        compare(a, "x.safetensors")
    (tmp_path / "empty").mkdir()
    for words in ([a, tmp_path / "missing.mp4"], [tmp_path / "empty", a], [a, a, "--output", "plot.jpg"]):
        assert cli.main(["compare", *map(str, words)]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("error: ")) == ("", 1)


# Latents -----------------------------------------------------------------------------------------------------------


def keep(path, latents):
    from safetensors.numpy import save_file

    save_file({"latents": latents}, path)
    return path


def test_latents(tmp_path, capsys):
    a = np.random.default_rng(0).normal(size=(16, 3, 4, 6)).astype(np.float32)
    b = a.copy()
    b[:, 1] *= 1.1
    one, two = keep(tmp_path / "a.safetensors", a), keep(tmp_path / "b.safetensors", b)
    error, largest = compare(one, two).series
    assert error.values == pytest.approx((0, 0.1, 0), rel=1e-5)
    assert error.overall == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a), rel=1e-6)
    assert (error.worst, largest.worst) == (1, 1)
    assert largest.overall == pytest.approx(np.abs(a[:, 1]).max() * 0.1, rel=1e-4)
    assert cli.main(["compare", str(one), str(two), "--json", "--output", str(tmp_path / "p.png")]) == 0
    table = json.loads(capsys.readouterr().out)
    assert (table["kind"], table["channels"], table["frames"]) == ("latents", 16, 3)
    assert table["relative_error"]["worst_frame"] == 1
    assert table["largest_difference"]["worst"] == table["largest"] == pytest.approx(largest.overall)
    assert compare(one, one).identical
    with pytest.raises(RequestError, match="sizes differ"):
        compare(one, keep(tmp_path / "c.safetensors", a[:, :2].copy()))
    with pytest.raises(RequestError, match="not finite"):
        compare(one, keep(tmp_path / "d.safetensors", a * np.float32(np.nan)))
    with pytest.raises(RequestError, match="no latents"):
        compare(one, keep(tmp_path / "e.safetensors", a.astype(np.float16)))


def test_nothing_to_measure_latents_by(tmp_path):
    zero = np.zeros((16, 1, 2, 2), np.float32)
    one, two = keep(tmp_path / "a.safetensors", zero), keep(tmp_path / "b.safetensors", zero + 1)
    assert compare(one, two).series[0].values == (math.inf,)
    assert compare(one, one).series[0].values == (0,)
    assert plot(compare(one, two)).size == plot(compare(one, one)).size


# What is said and drawn --------------------------------------------------------------------------------------------


def test_report_in_80_columns_and_json(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    frames = clip(21)
    save(tmp_path / "a", frames), save(tmp_path / "b", noisy(frames, 5))
    assert cli.main(["compare", "a", "b"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["A  a", "B  b", "96x64, 21 frames"]
    assert all(len(line) <= 80 for line in lines)
    assert [line.split()[0] for line in lines[5:]] == ["PSNR", "SSIM", "largest"]
    assert cli.main(["compare", "a", "b", "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert (table["frames"], table["width"], table["identical"]) == (21, 96, False)
    level = table["psnr"]
    assert level["worst"] == min(level["frames"]) == level["frames"][level["worst_frame"]]


def test_plot_file(tmp_path, capsys):
    frames = clip(9)
    a, b = save(tmp_path / "a", frames), save(tmp_path / "b", noisy(frames, 8))
    words = ["compare", str(a), str(b), "--output", str(tmp_path / "plots" / "p.png")]
    assert cli.main(words) == 0
    with Image.open(tmp_path / "plots" / "p.png") as image:
        assert image.size == (1200, 850)
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 20)}
    assert {(31, 111, 180), (196, 84, 26), (255, 255, 255)} <= colours
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["p.png"]
    assert cli.main(words) == 2
    assert cli.main([*words, "--overwrite"]) == 0


@pytest.mark.parametrize(
    "values",
    [(40.0,), (math.inf,), (40.0, 40.0, 40.0), (40.0, math.inf, 41.0, math.inf), (1e-12, 2e-12), tuple(range(1, 400))],
)
def test_a_plot_of_anything(values):
    from wan22.compare import Comparison

    level = Series("PSNR", "dB", values, min(values), True)
    alike = Series("SSIM", "", tuple(min(1.0, value) for value in values), 1.0, True)
    largest = 0 if min(values) == math.inf else 3
    comparison = Comparison("一个红球.mp4", "x" * 300, "video", (len(values), 16, 16), (level, alike), largest)
    assert plot(comparison).size == (1200, 850)
