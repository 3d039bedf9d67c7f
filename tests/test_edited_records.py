"""Records, latents and states that were edited by hand, or come from a later version: one line that names the file."""

import json
import math
import struct

import pytest
from conftest import TINY

from wan22.cli import main

SMALL = ["--ckpt_dir", str(TINY), "--size", "32x32", "--frames", "5", "--steps", "1", "--prompt", "x", "--seed", "1"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished video with its record and latents beside it."""
    folder = tmp_path_factory.mktemp("made")
    assert main(["generate", *SMALL, "--output", str(folder / "v.mp4"), "--keep-latents", "--sidecar"]) == 0
    return folder


def refused(capsys, words, *expected):
    capsys.readouterr()
    assert main(list(map(str, words))) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.partition(":")[0] for line in err.splitlines()] in (["error"], ["error", "hint"]), err
    for text in expected:
        assert text in err, err


@pytest.mark.parametrize(("part", "name", "value"), [
    ("request", "invented_later", 1), ("request", "width", 10**400), ("request", "width", "64"),
    ("request", "task", []), ("request", "loras", [{"file": "x", "strength": "1"}]), ("request", "prompt", "\ud800"),
    ("precision", "vae", {}), ("precision", "attention", "invented later"), ("encoding", "crf", 99),
    ("encoding", "codec", []),
])  # fmt: skip
def test_made_again(capsys, made, tmp_path, part, name, value):
    document = json.loads((made / "v.json").read_text())
    document["wan22"][part][name] = value
    (tmp_path / "edited.json").write_text(json.dumps(document))
    refused(capsys, ["generate", "--from", tmp_path / "edited.json", "--ckpt_dir", TINY], "--from", "edited.json", name)


def edit(path, target, change):
    """Latents with another record, state or header; change: takes all three and the file's numbers, which it may
    replace."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    metadata = header["__metadata__"]
    record, state = json.loads(metadata["wan22"]), json.loads(metadata["state"])
    numbers = change(record, state, header) or data[end:]
    metadata["wan22"], metadata["state"] = json.dumps(record), json.dumps(state)
    text = json.dumps(header).encode()
    target.write_bytes(len(text).to_bytes(8, "little") + text + numbers)


EDITS = {
    "no numbers": (lambda record, state, header: struct.pack("<f", math.nan) * math.prod(header["latents"]["shape"]),
                   "not finite"),
    "another shape": (lambda record, state, header: header["latents"]["shape"].reverse(), "not what its record says"),
    "a shape below zero": (lambda record, state, header: header["latents"].update(
        shape=[-n for n in header["latents"]["shape"]]), "header"),
    "of whole numbers": (lambda record, state, header: header["latents"].update(dtype="I32"), "latents"),
    "more steps than there are": (lambda record, state, header: state.update(done=10**30), "state"),
    "no table of versions": (lambda record, state, header: record.update(versions="1"), "state"),
    "no table of an encoding": (lambda record, state, header: record.update(encoding=7), "not a table"),
}  # fmt: skip


@pytest.mark.parametrize("edited", EDITS)
def test_decoded(capsys, made, tmp_path, edited):
    change, expected = EDITS[edited]
    edit(made / "v.latents.safetensors", tmp_path / "e.latents.safetensors", change)
    refused(capsys, ["decode", tmp_path / "e.latents.safetensors", "--ckpt_dir", TINY], "e.latents", expected)
    assert [path.name for path in tmp_path.iterdir()] == ["e.latents.safetensors"]


@pytest.mark.parametrize("edited", [name for name in EDITS if "encoding" not in name])
def test_gone_on_with(capsys, made, tmp_path, monkeypatch, edited):
    monkeypatch.chdir(tmp_path)
    change, expected = EDITS[edited]
    edit(made / "v.latents.safetensors", tmp_path / "v.state.safetensors", change)
    before = (tmp_path / "v.state.safetensors").read_bytes()
    refused(capsys, ["generate", *SMALL, "--output", "v.mp4"], "v.state", expected)
    assert (tmp_path / "v.state.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["v.state.safetensors"]
    assert main(["generate", *SMALL]) == 0, "a state that is none is in nobody's way"
