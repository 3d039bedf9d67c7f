"""What the tests share: the golden data and a checkpoint opened once."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
TINY = GOLDEN / "tiny-T2V-A14B"

# No test may look for weights on the machine it runs on, nor at the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch comes; several processes share the cores
os.environ.pop("WAN22_CKPT_DIR", None)
os.environ["WAN22_PROMPT_CACHE"] = "off"  # nor what earlier runs have kept
# Without a GPU, Triton's kernels run in its interpreter. Triton looks here when a kernel is defined.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests")]


@pytest.fixture(scope="session")
def tiny():
    from wan22.checkpoint import open_checkpoint

    return open_checkpoint(TINY)


@pytest.fixture
def tiny_copy(tmp_path):
    """A tiny checkpoint that a test may break."""
    import shutil

    return Path(shutil.copytree(TINY, tmp_path / "weights"))


@pytest.fixture
def device():
    """A GPU where there is one."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def forced(monkeypatch, device):
    """Triton's form of every kernel, whatever the device; in inference, without which there is none."""
    import torch

    from wan22.kernels import dispatch

    if dispatch.triton is None:
        pytest.skip("Triton is not installed")
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no GPU, and TRITON_INTERPRET=1 is not set")
    monkeypatch.setattr(dispatch, "MODE", "triton")
    with torch.inference_mode():
        yield
