"""The embedded demo: a checkpoint like any other, small, and both of its experts matter."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

from wan22 import Pipeline
from wan22.cli import main
from wan22.config import data_dir

sys.path.insert(0, str(ROOT / "scripts"))
from demo_score import score

SMALL = {"width": 64, "height": 64, "num_frames": 9, "num_steps": 8}
PROMPTS = 12


@pytest.fixture(scope="module")
def pipe():
    return Pipeline.from_pretrained("demo")


def test_it_is_small_and_of_the_published_layout(capsys):
    total = sum(path.stat().st_size for path in data_dir("demo").rglob("*") if path.is_file())
    print(f"{total:,} bytes")
    assert total < 24e6
    assert main(["show", str(data_dir("demo")), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (shown["layout"], shown["missing"], shown["broken"]) == ("published", [], [])


def test_what_it_makes_unless_told_otherwise(pipe):
    request = pipe.request("a red circle moving left")
    assert (request.width, request.height, request.num_frames, request.fps) == (128, 128, 33, 16)


def test_colours_motions_and_shapes_of_words_never_seen_together(pipe):
    """At the smallest size, where shapes are a few pixels wide; docs/demo.md has the demo's own size."""
    result = score(pipe, PROMPTS, **SMALL)
    print(result.right, *result.misses, sep="\n")
    assert result.right["colour"] >= 0.9 * PROMPTS
    assert result.right["motion"] >= 0.75 * PROMPTS
    assert result.right["shape"] >= 0.4 * PROMPTS


def test_in_chinese_from_the_command_line(tmp_path):
    words = ["--model", "demo", "--size", "64x64", "--frames", "9", "--steps", "4", "--seed", "1", "--output", "v.mp4"]
    command = [sys.executable, "-m", "wan22", "generate", "--prompt", "红色的圆形向左移动，白色背景", *words]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=None, check=False)
    assert (result.returncode, result.stdout) == (0, "v.mp4\n"), result.stderr
    assert json.loads(subprocess.run([sys.executable, "-m", "wan22", "show", "v.mp4"], capture_output=True, text=True,
                                     cwd=tmp_path, check=True).stdout)["model"] == "demo"  # fmt: skip
