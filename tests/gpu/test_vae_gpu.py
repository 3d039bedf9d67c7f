"""On a GPU: the VAE's numbers, bf16's distance, and its memory against the plan's; prompts kept on disk."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import TINY

from wan22.checkpoint import open_checkpoint
from wan22.config import Placement, Precision, data_dir
from wan22.files.part_shapes import vae_shapes
from wan22.files.tensor_files import Safetensors
from wan22.kernels import dispatch
from wan22.measuring.random_weights import RandomTensors
from wan22.pipeline import Pipeline
from wan22.prompt_cache import VARIABLE
from wan22.report import Reporter
from wan22.vae import VideoVAE
from wan22.vae_sizes import decode_terms

pytestmark = [
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]  # fmt: skip
DEMO = data_dir("demo") / "Wan2.1_VAE.safetensors"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def cuda():
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(scope="module")
def checkpoint():
    return open_checkpoint(TINY)


@pytest.fixture
def exact_convolutions():
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = before


def latents(frames=6, height=12, width=20):
    return torch.randn(16, frames, height, width, generator=torch.Generator().manual_seed(0))


def decode(checkpoint, device, dtype=torch.float32, grid=(1, 1), z=None):
    return torch.cat([chunk.cpu() for chunk in VideoVAE(checkpoint, device, dtype).decode(
        latents() if z is None else z, grid)])  # fmt: skip


def psnr(a, b):
    return 10 * math.log10(4 / (a - b).square().mean().item())


def test_float32_is_the_cpus(checkpoint, cuda, exact_convolutions, monkeypatch):
    expected = decode(checkpoint, CPU)
    whole = decode(checkpoint, cuda)
    print(f"largest difference from the CPU {(whole - expected).abs().max():.1e}")
    assert (whole - expected).abs().max() < 1e-3
    assert (decode(checkpoint, cuda, grid=(1, 2)) - whole).abs().max() < 1e-4
    monkeypatch.setattr(dispatch, "MODE", "plain")
    assert (decode(checkpoint, cuda) - whole).abs().max() < 1e-4


def test_bf16(checkpoint, cuda):
    for name, one in (("tiny", checkpoint), ("demo", replace(checkpoint, vae=Safetensors(DEMO)))):
        expected = decode(one, CPU)
        far = {dtype: psnr(decode(one, cuda, dtype), expected) for dtype in (torch.float32, torch.bfloat16)}
        print(f"{name}: PSNR to float32 on a CPU: {far}")
        assert far[torch.bfloat16] >= 50
        assert far[torch.float32] > far[torch.bfloat16]  # TF32, as PyTorch has it by default


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_the_plans(checkpoint, cuda, dtype):
    """The published width, 480p, a few frames."""
    one = replace(checkpoint, vae=RandomTensors(TINY, vae_shapes(96), cuda))
    z = latents(6, 60, 104)
    vae = VideoVAE(one, cuda, dtype)
    for _ in vae.decode(z[:, :3]):
        pass
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    for chunk in vae.decode(z):
        assert chunk.isfinite().all()
    measured = torch.cuda.max_memory_allocated()
    terms = decode_terms(tuple(z.shape), 96, (1, 1), dtype.itemsize)
    predicted = sum(terms.values())
    print(f"{dtype}: predicted {predicted / 2**30:.2f} GiB, measured {measured / 2**30:.2f}; {terms}")
    # Convolution workspaces are the library's choice; they show in the table of `wan22 bench --memory`.
    assert 0.6 * predicted < measured < 1.5 * predicted


def test_a_kept_prompt_is_bit_identical(cuda, tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path))

    def encode(mode="device"):
        pipe = Pipeline(open_checkpoint(TINY), Precision("bf16", "torch"), Placement(str(cuda)))
        return pipe.encode(["a red ball"], Reporter(), mode)[0]

    first = encode()
    assert len(list(tmp_path.iterdir())) == 1
    assert torch.equal(encode(), first)
    encode("cpu")  # rounds otherwise, and is kept apart
    assert len(list(tmp_path.iterdir())) == 2
