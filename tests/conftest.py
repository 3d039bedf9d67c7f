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
os.environ.pop("WAN22_CKPT_DIR", None)
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
