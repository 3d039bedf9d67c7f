"""Encoded prompts on disk: what comes out is what encoding gives, bit for bit, or nothing."""

import re

import pytest
import torch
from conftest import TINY

from wan22 import cli, prompt_cache, text_encoder
from wan22.checkpoint import open_checkpoint
from wan22.config import MODEL_SPECS, Placement, Precision
from wan22.measuring.random_weights import random_checkpoint
from wan22.pipeline import Pipeline
from wan22.prompt_cache import VARIABLE, Encoded, PromptCache, cache_for
from wan22.report import Reporter

CPU = torch.device("cpu")
PROMPTS = ["a red ball", MODEL_SPECS["t2v-A14B"].negative_prompt]
LONG = "word " * 600


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "prompts"))
    return tmp_path / "prompts"


@pytest.fixture
def no_encoder(monkeypatch):
    """From here on nothing is encoded."""

    def forbid():
        def refuse(*args, **kwargs):
            raise AssertionError("the text encoder was asked for")

        monkeypatch.setattr(text_encoder, "TextEncoder", refuse)

    return forbid


class Heard(Reporter):
    def __init__(self):
        super().__init__()
        self.said = []

    def warn(self, text):
        self.said.append(text)


def pipe(dtype="float32", **placement):
    return Pipeline(open_checkpoint(TINY), Precision(dtype), Placement("cpu", **placement))


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_a_hit_is_bit_identical(folder, no_encoder, dtype):
    first = pipe(dtype).encode(PROMPTS, Reporter())
    assert len(list(folder.iterdir())) == 2
    no_encoder()
    again = pipe(dtype).encode(PROMPTS, Reporter())
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(first, again, strict=True))
    with pytest.raises(AssertionError, match="was asked for"):
        pipe(dtype).encode(["another prompt"], Reporter())


def test_a_cut_prompt_is_told_every_time(folder, no_encoder):
    for _ in range(2):
        heard = Heard()
        pipe().encode([LONG], heard)
        assert len(heard.said) == 1
        assert "longer than 512 tokens" in heard.said[0]
        no_encoder()


@pytest.mark.parametrize("spoil", [
    lambda raw: raw[:-1], lambda raw: b"", lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]), lambda raw: b"{}\n" + raw,
    lambda raw: raw.replace(b'"shape": [', b'"shape": [9, '), lambda raw: raw.replace(b"shape", b"Shape", 1),
    lambda raw: re.sub(rb'"shape": [^]]*', b'"shape": [-1, 2', raw), lambda raw: raw.replace(b"false", b"true", 1),
    lambda raw: b"5" + raw[raw.index(b"\n"):], lambda raw: b"\xff" * 50,
])  # fmt: skip
def test_a_spoiled_file_is_a_miss(folder, spoil):
    expected = pipe().encode(PROMPTS[:1], Reporter())[0]
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    file.write_bytes(spoil(whole))
    cache = cache_for(open_checkpoint(TINY), torch.float32, CPU)
    assert cache.get(PROMPTS[0]) is None
    assert torch.equal(pipe().encode(PROMPTS[:1], Reporter())[0], expected)
    assert file.read_bytes() == whole  # written again


def test_what_the_numbers_depend_on(folder, tiny_copy, monkeypatch):
    pipe().encode(PROMPTS[:1], Reporter())
    here = open_checkpoint(TINY)
    assert cache_for(here, torch.float32, CPU).get(PROMPTS[0])
    assert cache_for(open_checkpoint(tiny_copy), torch.float32, CPU).get(PROMPTS[0])  # the same files elsewhere
    assert cache_for(here, torch.bfloat16, CPU).get(PROMPTS[0]) is None
    assert cache_for(here, torch.float32, CPU).get(PROMPTS[0] + " ") is None
    with monkeypatch.context() as context:
        context.setattr(torch, "__version__", "9")
        assert cache_for(here, torch.float32, CPU).get(PROMPTS[0]) is None
    with monkeypatch.context() as context:
        context.setattr(torch, "get_num_threads", lambda: 77)
        assert cache_for(here, torch.float32, CPU).get(PROMPTS[0]) is None
    text = next(tiny_copy.glob("models_t5*"))
    raw = bytearray(text.read_bytes())
    raw[len(raw) // 2] ^= 1
    tokenizer = tiny_copy / "google" / "umt5-xxl" / "tokenizer_config.json"
    told = tokenizer.read_text()
    tokenizer.write_text(told + " ")
    assert cache_for(open_checkpoint(tiny_copy), torch.float32, CPU).get(PROMPTS[0]) is None
    tokenizer.write_text(told)
    text.write_bytes(raw[:-1] + b"\0" if raw[-1] else raw[:-1] + b"\1")
    changed = open_checkpoint(tiny_copy)
    assert changed.text_identity() != here.text_identity()


def test_it_is_bounded_and_leaves_others_alone(folder, monkeypatch):
    cache = PromptCache(folder, open_checkpoint(TINY), torch.float32, CPU)
    context = torch.randn(8, 32)
    folder.mkdir()
    (folder / "mine.txt").write_text("not the cache's")
    monkeypatch.setattr(prompt_cache, "MOST_BYTES", 3000)
    for number in range(5):
        cache.put(f"prompt {number}", Encoded(context, False))
    kept = [number for number in range(5) if cache.get(f"prompt {number}")]
    assert len(kept) == 2
    assert 4 in kept
    assert (folder / "mine.txt").exists()
    assert not list(folder.glob("*.part"))


def test_no_place_for_it_is_no_trouble(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "file"))
    assert pipe().encode(PROMPTS[:1], Reporter())[0].shape[1] > 0


def test_it_can_be_turned_off(folder, monkeypatch):
    pipe(prompt_cache=False).encode(PROMPTS, Reporter())
    assert not folder.exists()
    monkeypatch.setenv(VARIABLE, "off")
    assert cache_for(open_checkpoint(TINY), torch.float32, CPU) is None
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert str(prompt_cache.default_folder()) == "/somewhere/wan22/prompts"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home")
    assert str(prompt_cache.default_folder()) == "/home/.cache/wan22/prompts"
    assert cache_for(random_checkpoint(CPU, layers=1), torch.float32, CPU) is None  # they lie in no file


def test_what_another_device_encoded_is_not_kept(folder, monkeypatch):
    """After running out of memory the prompts may be the CPU's work, which rounds otherwise than a GPU's."""
    call, calls = text_encoder.TextEncoder.__call__, iter(range(99))

    def fails_once(self, ids):
        if next(calls) == 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return call(self, ids)

    monkeypatch.setattr(text_encoder.TextEncoder, "__call__", fails_once)
    heard = Heard()
    pipe().encode(PROMPTS, heard)
    assert len(heard.said) == 1
    assert not folder.exists()


def test_at_the_command_line(folder, tmp_path, monkeypatch, capsys, no_encoder):
    monkeypatch.chdir(tmp_path)
    typed = ["generate", "--ckpt_dir", str(TINY), "--size", "32x32", "--frames", "1", "--steps", "2", "--prompt",
             "a ball", "--seed", "3", "--output"]  # fmt: skip
    assert cli.main([*typed, "off.mp4", "--no-prompt-cache"]) == 0
    assert not folder.exists()
    assert cli.main([*typed, "first.mp4"]) == 0
    assert "to first step" in capsys.readouterr().err
    no_encoder()
    assert cli.main([*typed, "second.mp4"]) == 0
    files = [(tmp_path / f"{name}.mp4").read_bytes() for name in ("off", "first", "second")]
    assert len(set(files)) == 1
