"""Files and variables that other programs, or people, have written: latents that are no numbers, records edited by
hand, maps that are damaged, an environment that makes no sense."""

import json

import pytest
import torch
from conftest import TINY

from wan22.cli import main
from wan22.config import Request, RequestError
from wan22.preview import kept_map
from wan22.several.launch import WATCH, Team, connect, follows, rendezvous
from wan22.video import check_writable

SETTINGS = ["generate", "--ckpt_dir", str(TINY), "--size", "32x32", "--frames", "1", "--steps", "1", "--prompt", "a",
            "--seed", "1", "--device", "cpu", "--shift", "3"]  # fmt: skip


def test_latents_that_are_no_numbers(tmp_path, monkeypatch, capsys):
    from safetensors import safe_open
    from safetensors.torch import save_file

    monkeypatch.chdir(tmp_path)
    assert main([*SETTINGS, "--output", "a.mp4", "--keep-latents"]) == 0
    with safe_open("a.latents.safetensors", "pt") as file:
        metadata, latents = file.metadata(), file.get_tensor("latents")
    latents[0, 0, 0, 0] = torch.nan
    save_file({"latents": latents}, "nan.latents.safetensors", metadata)
    capsys.readouterr()
    assert main(["decode", "nan.latents.safetensors", "--ckpt_dir", str(TINY), "--device", "cpu"]) == 2
    assert "nan.latents.safetensors: its latents are not finite numbers" in capsys.readouterr().err
    assert not (tmp_path / "nan.mp4").exists()


@pytest.mark.parametrize("task", [["t2v-A14B"], {}, 5, None])
def test_a_record_whose_task_is_no_text(task):
    with pytest.raises(RequestError, match="--task"):
        Request.from_dict({"prompt": "x", "task": task})


@pytest.mark.parametrize("path", [".", "/"])
@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_an_output_without_a_name(path, overwrite, capsys):
    with pytest.raises(RequestError, match="cannot write"):
        check_writable(path)
    assert main([*SETTINGS, "--output", path, *overwrite]) == 2
    assert f"cannot write {path}:" in capsys.readouterr().err


def test_damaged_maps_are_made_again(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    good = torch.ones(3, 16)
    monkeypatch.setattr("wan22.preview.fit_map", lambda encode: (good, torch.zeros(3)))
    kept_map(tiny)
    (path,) = (tmp_path / "wan22").iterdir()
    for weights, bias in (([[1], [1], [1]], [0, 0, 0]), ([], []), (5, 1), (good.tolist(), [0, 0, float("nan")])):
        path.write_text(json.dumps({"format": 1, "weights": weights, "bias": bias}))
        assert torch.equal(kept_map(tiny)[0], good), weights
    path.write_text("[" * 100_000)
    assert torch.equal(kept_map(tiny)[0], good)


@pytest.mark.parametrize("said", [{"RANK": "x"}, {"RANK": ""}, {"RANK": "2"}])
def test_an_environment_without_sense_is_told_by_whoever_finds_it(said, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", said["RANK"])
    assert main(SETTINGS) == 2
    assert f"RANK={said['RANK']}" in capsys.readouterr().err


def test_who_follows():
    assert follows({"RANK": "1", "WORLD_SIZE": "2"})
    assert not follows({"RANK": "0", "WORLD_SIZE": "2"})
    assert not follows({"RANK": "5", "WORLD_SIZE": "2"})


def test_variables_that_are_junk():
    with pytest.raises(RequestError, match="SLURM"):
        rendezvous({"SLURM_JOB_ID": "x"}, Team(0, 2))
    for junk in ("junk", "127.0.0.1 1 token", "127.0.0.1 x token"):  # nobody listens at port 1
        with pytest.raises(RequestError, match=WATCH):
            connect({WATCH: junk}, Team(0, 2))
