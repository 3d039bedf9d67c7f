"""The preview: a map fitted by the VAE itself, pictures while a run works, nothing left when the video is there."""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from PIL import Image

from wan22 import cli, preview
from wan22.config import Request

SMALL = ["generate", "--ckpt_dir", str(TINY), "--size", "64x48", "--frames", "9", "--prompt", "x", "--seed", "1"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(preview, "PICTURES", 4)  # enough where nobody looks
    return tmp_path / "cache" / "wan22"


def test_the_map_finds_what_is_linear(monkeypatch):
    """A make-believe encoder whose latents are colours in another basis: its map is exact but for the ridge."""
    basis = torch.linalg.qr(torch.randn(16, 3, generator=torch.Generator().manual_seed(1)))[0]

    def encode(frames):
        small = torch.nn.functional.avg_pool2d(frames.transpose(0, 1), 8)
        return torch.einsum("cr,frhw->cfhw", basis, small[[0, -1]]) + 0.5

    monkeypatch.setattr(preview, "PICTURES", 24)
    weights, bias = preview.fit_map(encode)
    picture = preview.draw_pictures(4)[3]
    seen = preview.to_rgb(encode(picture[:, None].expand(-1, 5, -1, -1)), weights, bias)
    wanted = torch.nn.functional.avg_pool2d(picture[None], 8)[0].permute(1, 2, 0)
    error = np.abs(seen[0] / 127.5 - 1 - wanted.numpy())
    print(f"largest error {error.max():.4f}, mean {error.mean():.4f}")
    assert error.max() < 0.05


def test_a_map_is_fitted_once_for_a_vae(tiny, tiny_copy, cache, monkeypatch):
    from wan22.checkpoint import open_checkpoint

    weights, bias = preview.kept_map(tiny)
    assert (weights.shape, bias.shape) == ((3, 16), (3,))
    files = list(cache.iterdir())
    assert len(files) == 1

    def no_vae(*_):
        raise AssertionError("fitted again")

    with monkeypatch.context() as patch:
        patch.setattr(preview, "VideoVAE", no_vae)
        again, _ = preview.kept_map(tiny)
        assert torch.equal(again, weights)
        file = tiny_copy / "Wan2.1_VAE.pth"
        assert open_checkpoint(tiny_copy).vae_identity() == tiny.vae_identity()
        state = torch.load(file)
        state["conv2.weight"][0] += 1
        torch.save(state, file)
        with pytest.raises(AssertionError, match="fitted again"):  # another VAE
            preview.kept_map(open_checkpoint(tiny_copy))
    files[0].write_text('{"format": 1, "weights": [')
    assert torch.equal(preview.kept_map(tiny)[0], weights)


def test_clean_latents():
    from wan22.sampling import clean

    data, noise = torch.randn(2, 4, 3, 3, 3)
    assert torch.allclose(clean(0.3 * data + 0.7 * noise, noise - data, 0.7), data, atol=1e-6)


def test_a_run_shows_itself_and_tidies_up(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preview, "EVERY", 0.0)
    seen = []

    def replace(source, target):
        if str(target).endswith(".webp"):
            seen.append(source.read_bytes())
        os.rename(source, target)

    monkeypatch.setattr(preview.os, "replace", replace)
    assert cli.main([*SMALL, "--steps", "6", "--output", "v.mp4", "--preview"]) == 0
    assert "preview: v.preview.webp" in capsys.readouterr().err
    assert seen
    (tmp_path / "seen.webp").write_bytes(seen[-1])
    with Image.open(tmp_path / "seen.webp") as image:
        assert (image.size, image.n_frames) == ((64, 48), 3)
    (tmp_path / "seen.webp").unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "v.mp4"]
    assert cli.main([*SMALL, "--steps", "6", "--output", "w.mp4"]) == 0
    assert (tmp_path / "v.mp4").read_bytes() == (tmp_path / "w.mp4").read_bytes()


def test_it_never_stops_a_run(tiny, tmp_path):
    said = []
    show = preview.Preview(tiny, Request("x"), tmp_path / "none" / "v.mp4", said.append)
    show.look(lambda: torch.zeros(16, 3, 6, 8))
    show.close()
    assert len(said) == 1
    assert "no preview" in said[0]
    show.look(lambda: pytest.fail("once is enough"))


def test_a_slow_one_is_not_waited_for(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(preview, "EVERY", 0.0)
    hold = threading.Event()
    monkeypatch.setattr(preview, "kept_map", lambda _: hold.wait(20) and (torch.zeros(3, 16), torch.zeros(3)))
    show = preview.Preview(tiny, Request("x"), tmp_path / "v.mp4", pytest.fail)
    start = time.perf_counter()
    for _ in range(50):
        show.look(lambda: torch.zeros(16, 3, 6, 8))
    assert time.perf_counter() - start < 5
    hold.set()
    show.close()
    assert (tmp_path / "v.preview.webp").exists()


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_ctrl_c_keeps_state_and_preview_and_the_same_command_goes_on(tiny, tmp_path):
    preview.kept_map(tiny)  # a second or two, which a small run has not
    words = [sys.executable, "-m", "wan22", *SMALL, "--steps", "500", "--output", "v.mp4", "--preview"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(words, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True) as process:  # fmt: skip
        while process.poll() is None and not (tmp_path / "v.preview.webp").exists():
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, ""), err
    assert "kept in v.state.safetensors" in err.splitlines()[-1]
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["cache", "v.preview.webp", "v.state.safetensors"]
    with Image.open(tmp_path / "v.preview.webp") as image:
        image.load()
    result = subprocess.run([word for word in words if word != "--preview"], cwd=tmp_path, env=environment,
                            capture_output=True, text=True)  # fmt: skip
    assert result.returncode == 0
    assert "going on from step" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "v.mp4"]
