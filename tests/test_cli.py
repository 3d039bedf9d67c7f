"""Whole commands on the tiny checkpoint, as a user types them."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, TINY

import wan22
from wan22 import cli, options
from wan22.config import Placement, Precision, Request, RequestError, load_preset, parse_size, preset_names
from wan22.video import read_frames

TYPED = ["generate", "--ckpt_dir", str(TINY), "--size", "64*48", "--frame_num", "5", "--sample_steps", "2",
         "--prompt", "A red ball, 红球: 50% \"done\""]  # fmt: skip


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys, *words):
    code = cli.main([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


def test_generate_show_and_again(capsys, elsewhere):
    code, out, err = run(capsys, *TYPED, "--base_seed", "7", "--save_file", "one.mp4")
    assert (code, out) == (0, "one.mp4\n")
    assert "2 steps high noise, 0 low noise" in err
    for part in ("seed 7", "encode the text", "denoise", "decode and write", "GiB host"):
        assert part in err
    assert [path.name for path in elsewhere.iterdir()] == ["one.mp4"]
    frames, fps = read_frames("one.mp4")
    assert (frames.shape, fps) == ((5, 48, 64, 3), 16)

    code, out, _ = run(capsys, "show", "one.mp4")
    record = json.loads(out)
    assert record["request"]["prompt"] == TYPED[-1]
    assert record["request"]["seed"] == 7
    assert record["precision"] == Precision("float32", "torch").to_dict()
    assert record["versions"]["wan22"] == wan22.__version__
    assert str(ROOT) not in out

    assert run(capsys, "generate", "--from", "one.mp4", "--ckpt_dir", TINY, "--output", "two.mp4")[0] == 0
    assert (elsewhere / "one.mp4").read_bytes() == (elsewhere / "two.mp4").read_bytes()
    run(capsys, "generate", "--from", "one.mp4", "--ckpt_dir", TINY, "--output", "three.mp4", "--seed", "8")
    assert json.loads(run(capsys, "show", "three.mp4")[1])["request"] == record["request"] | {"seed": 8}


def test_another_checkpoint_is_not_the_same_video(capsys, tiny_copy):
    run(capsys, *TYPED, "--output", "one.mp4")
    shard = next((tiny_copy / "low_noise_model").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    code, _, err = run(capsys, "generate", "--from", "one.mp4", "--ckpt_dir", tiny_copy, "--output", "two.mp4")
    assert code == 2
    assert "another checkpoint" in err


def test_a_name_of_its_own_and_nothing_overwritten(capsys, elsewhere):
    first = run(capsys, *TYPED, "--seed", "1")[1].strip()
    second = run(capsys, *TYPED, "--seed", "1")[1].strip()
    assert first.startswith("A-red-ball-红球-50-done-")
    assert second == first.replace(".mp4", "-2.mp4")
    assert (elsewhere / first).read_bytes() == (elsewhere / second).read_bytes()
    assert run(capsys, *TYPED, "--output", first)[0] == 2
    assert run(capsys, *TYPED, "--output", first, "--overwrite", "--seed", "2")[0] == 0
    assert (elsewhere / first).read_bytes() != (elsewhere / second).read_bytes()


@pytest.mark.parametrize("name", ["v.gif", "v.png", "frames"])
def test_other_outputs(capsys, name):
    code, out, _ = run(capsys, *TYPED, "--seed", "1", "--output", name)
    assert (code, out.strip()) == (0, name)
    assert json.loads(run(capsys, "show", name)[1])["request"]["seed"] == 1


def test_keep_latents(capsys, elsewhere):
    run(capsys, *TYPED, "--seed", "3", "--output", "v.mp4", "--keep-latents")
    assert sorted(path.name for path in elsewhere.iterdir()) == ["v.latents.safetensors", "v.mp4"]
    assert json.loads(run(capsys, "show", "v.latents.safetensors")[1])["request"]["seed"] == 3


def test_crf_codec_and_sidecar(capsys, elsewhere):
    words = ("--seed", "3", "--frames", "1", "--codec", "libx265", "--crf", "30", "--sidecar")
    assert run(capsys, *TYPED, *words, "--output", "v.mp4")[0] == 0
    assert sorted(path.name for path in elsewhere.iterdir()) == ["v.json", "v.mp4"]
    shown = json.loads(run(capsys, "show", "v.mp4")[1])
    assert json.loads((elsewhere / "v.json").read_text(encoding="utf-8"))["wan22"] == shown
    assert json.loads(run(capsys, "show", "v.json")[1]) == shown
    assert shown["encoding"] == {"crf": 30, "codec": "libx265"}
    assert run(capsys, "generate", "--from", "v.json", "--ckpt_dir", TINY, "--output", "w.mp4")[0] == 0
    assert (elsewhere / "w.mp4").read_bytes() == (elsewhere / "v.mp4").read_bytes()
    (elsewhere / "x.json").write_text("mine")
    for wrong in (["--crf", "52"], ["--codec", "vp9"], ["--crf", "5", "--output", "y.gif"],
                  ["--sidecar", "--output", "x.mp4"]):  # fmt: skip
        code, out, err = run(capsys, *TYPED, "--output", "y.mp4", *wrong)
        assert (code, out, err.count("error: ")) == (2, "", 1)
    assert (elsewhere / "x.json").read_text() == "mine"
    name = run(capsys, *TYPED, "--seed", "3", "--frames", "1", "--sidecar")[1].strip()
    assert (elsewhere / name.replace(".mp4", ".json")).is_file()


def test_the_shell_completes():
    """What the shell asks, and is answered."""
    for words, place, answer in (("wan22 gen", "1", "generate"), ("wan22 generate --keep", "2", "--keep-latents")):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "COMP_WORDS": words, "COMP_CWORD": place,
                       "_WAN22_COMPLETE": "complete_bash"}  # fmt: skip
        asked = subprocess.run([sys.executable, "-m", "wan22"], env=environment, capture_output=True, text=True)
        assert asked.stdout.split() == [answer]


def test_json_and_dry_run(capsys, elsewhere):
    code, out, _ = run(capsys, *TYPED, "--dry-run", "--json")
    assert code == 0
    assert json.loads(out)["event"] == "plan"
    assert list(elsewhere.iterdir()) == []
    code, out, _ = run(capsys, *TYPED, "--dry-run")
    assert "2 steps high noise" in out
    events = [json.loads(line) for line in run(capsys, *TYPED, "--json", "--output", "v.mp4")[1].splitlines()]
    assert [event["event"] for event in events] == ["note", "note", "step", "step", "finished"]
    assert events[-1]["path"] == "v.mp4"
    assert [phase["name"] for phase in events[-1]["phases"]] == ["encode the text", "denoise", "decode and write"]


def test_warnings(capsys):
    code, _, err = run(capsys, *TYPED, "--frames", "85", "--dry-run")
    assert (code, "trained on 81" in err) == (0, True)
    code, _, err = run(capsys, *TYPED, "--prompt", "long " * 600, "--output", "v.mp4", "--steps", "1")
    assert (code, "longer than 512 tokens" in err) == (0, True)


def test_failing_while_writing_keeps_the_latents(capsys, elsewhere, monkeypatch):
    from wan22 import pipeline, video
    from wan22.config import RunError

    class Full(video.VideoWriter):
        pass

    def full(*args, **kwargs):
        raise RunError("v.mp4: no space left on the disk")

    monkeypatch.setattr(pipeline, "open_output", full)
    code, _, err = run(capsys, *TYPED, "--output", "v.mp4")
    assert code == 1
    assert "no space" in err
    assert "v.state.safetensors" in err
    assert [path.name for path in elsewhere.iterdir()] == ["v.state.safetensors"]
    monkeypatch.undo()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setattr(pipeline, "denoise", None)  # all that is left is to decode
    assert run(capsys, *TYPED, "--output", "v.mp4")[0] == 0
    assert [path.name for path in elsewhere.iterdir()] == ["v.mp4"]


def test_interrupted(capsys, monkeypatch):
    from wan22 import pipeline

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline.Pipeline, "denoise", interrupt)
    assert run(capsys, *TYPED)[0] == 130


def test_closed_streams_and_narrow_encodings(capsys, elsewhere):
    run(capsys, *TYPED, "--seed", "7", "--output", "v.mp4")
    shown = run(capsys, "show", "v.mp4")[1]
    command = [sys.executable, "-m", "wan22", "show"]
    narrow = os.environ | {"PYTHONIOENCODING": "ascii:strict", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, "v.mp4"], capture_output=True, env=narrow)
    assert (done.returncode, json.loads(done.stdout.decode("ascii"))) == (0, json.loads(shown))
    for closed in ("<&-", ">&-", "2>&-", "<&- >&- 2>&-"):
        done = subprocess.run(["sh", "-c", f'"$@" {closed}', "sh", *command, "v.mp4"], capture_output=True, env=narrow)
        assert (done.returncode, done.stderr, bool(done.stdout)) == (0, b"", ">&-" not in closed or closed == "2>&-")
        done = subprocess.run(["sh", "-c", f'"$@" {closed}', "sh", *command, "none"], capture_output=True, env=narrow)
        assert (done.returncode, done.stdout) == (2, b"")  # an error never comes as data


def test_unforeseen_errors_are_one_line(capsys, monkeypatch):
    from wan22 import pipeline

    def broken(*args):
        raise ZeroDivisionError("a\nb")

    monkeypatch.setattr(pipeline.Pipeline, "denoise", broken)
    code, _, err = run(capsys, *TYPED)
    assert (code, err.splitlines()[-2:]) == (1, ["error: ZeroDivisionError: a b", "hint: the whole story: --debug"])
    with pytest.raises(ZeroDivisionError):
        cli.main([*TYPED, "--debug"])


def test_library(elsewhere):
    from wan22 import Pipeline

    pipe = Pipeline.from_pretrained(str(TINY), device="cpu", dtype="float32")
    result = pipe.generate(Request("a ball", width=64, height=48, num_frames=5, num_steps=2, seed=42))
    assert (result.video.dtype, result.video.shape) == (np.uint8, (5, 48, 64, 3))
    assert (str(result.latents.dtype), result.latents.shape) == ("torch.float32", (16, 2, 6, 8))
    assert result.save("out.mp4").is_file()
    with pytest.raises(RequestError, match=r"out\.mp4"):
        result.save("out.mp4")
    for both in ({"device": "cpu", "placement": Placement()}, {"dtype": "bf16", "precision": Precision()}):
        with pytest.raises(RequestError, match="goes with no"):
            Pipeline.from_pretrained(str(TINY), **both)
    again = pipe.generate(result.request)
    assert (again.latents == result.latents).all()


def test_dtype_flags():
    assert cli.normalize(["--frame_num", "a_b", "--x_y=c_d", "--", "--e_f"]) == (
        ["--frame-num", "a_b", "--x-y=c_d", "--", "--e_f"], False)  # fmt: skip
    assert [options.parse_bool("--x", word) for word in ("True", "false", "1", "no")] == [True, False, True, False]


def test_bf16_weights_and_one_expert_at_a_time(capsys):
    flags = ["--convert_model_dtype", "--offload_model", "True", "--t5_cpu", "--output", "v.mp4"]
    code, _, _ = run(capsys, *TYPED, *flags)
    assert code == 0
    assert json.loads(run(capsys, "show", "v.mp4")[1])["precision"] == Precision("bf16", "torch").to_dict()


def test_presets():
    assert preset_names() == ["480p", "720p", "demo", "draft", "lightning", "three-phase"]
    for name in preset_names():
        preset = load_preset(name)
        Request.from_dict({"prompt": "x", **preset.request})
        Precision(**preset.precision), Placement(**preset.placement)
        assert preset.description
    assert Request("x", **load_preset("720p").request) == Request("x")
    published = Request("x", **load_preset("480p").request)
    assert (published.width, published.height, published.num_steps) == (832, 480, 40)


@pytest.mark.parametrize(
    ("text", "size"), [("720p", (1280, 720)), ("480P", (832, 480)), ("640*368", (640, 368)), (" 64 x 48 ", (64, 48))]
)
def test_sizes(text, size):
    assert parse_size(text) == size
