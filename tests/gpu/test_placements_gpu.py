"""On a GPU: placements in bf16 are bit-identical, each takes the memory that it says, and running out is survived.

    python -m pytest -m gpu -s          # under 90 s on an H100
"""

import gc

import numpy as np
import pytest
import torch
from conftest import TINY
from test_placements import EVERY, HIGH, LAYERS, REQUEST, adapter, deep  # noqa: F401 (fixtures)

from wan22 import attention, cli
from wan22.attention import BACKENDS, Shape, choose
from wan22.config import Lora, Placement, Precision, Request, RequestError, Residency
from wan22.experts import Experts
from wan22.measuring.random_weights import random_checkpoint
from wan22.pipeline import Pipeline
from wan22.report import Reporter
from wan22.residency import memory
from wan22.residency.memory import CudaMemory
from wan22.residency.streaming import pieces_of

pytestmark = [
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]  # fmt: skip
MIB = 1 << 20
WIDER = {"dim": 1024, "ffn_dim": 2816, "num_heads": 8, "num_layers": LAYERS}  # 0.25 GB an expert


@pytest.fixture(scope="module")
def cuda():
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(scope="module")
def wider(cuda):
    text = {"vocab": 256384, "width": 64, "ffn": 64, "heads": 2, "layers": 1}
    return random_checkpoint(cuda, sizes={**WIDER, "text_dim": 64}, text=text, vae_width=16)


class Heard(Reporter):
    def __init__(self):
        super().__init__()
        self.said = []

    def warn(self, text):
        self.said.append(text)


def denoised(checkpoint, ladder, cuda, loras=(), reporter=None):
    """Latents, experts, and the most that this took beside what was there: bytes of the device, bytes pinned."""
    pipe = Pipeline(checkpoint, Precision("bf16", "torch"), Placement(str(cuda)))
    pinned = CudaMemory(cuda)
    pipe.experts = Experts(checkpoint, torch.bfloat16, cuda, pipe.adapters, list(ladder), pinned)
    pipe.experts.use = lambda ladder: None
    request = pipe.resolve(Request.from_dict({**REQUEST.to_dict(), "loras": list(loras)}))
    pipe.encode([request.prompt, request.negative_prompt], Reporter())  # the text encoder's memory is not looked at
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(cuda)
    before = torch.cuda.memory_allocated(cuda)
    latents = pipe.denoise(request, reporter or Reporter())
    peak = torch.cuda.max_memory_allocated(cuda) - before
    kind = pipe.experts.residency.kind
    pipe.experts.release()
    return latents, kind, peak, pinned.on_host.peak


@pytest.mark.parametrize("adapted", [False, True])
def test_bit_identical_from_files(deep, adapter, cuda, adapted):  # noqa: F811
    loras = [Lora(str(adapter), 0.8)] if adapted else []
    expected = denoised(deep, EVERY[:1], cuda, loras)[0]
    assert expected.isfinite().all()
    for residency in EVERY[1:]:
        latents = denoised(deep, [residency], cuda, loras)[0]
        assert torch.equal(latents, expected), residency


def test_each_takes_what_it_says(wider, cuda):
    pieces = pieces_of(Experts(wider, torch.bfloat16, cuda, None)._empty[HIGH])
    block, rest = pieces[0].nbytes, pieces[-1].nbytes
    whole = rest + LAYERS * block
    denoised(wider, EVERY[:1], cuda)  # libraries take their workspaces
    expected, _, most, _ = denoised(wider, EVERY[:1], cuda)
    work = most - 2 * whole
    assert 0 < work < 0.5 * whole
    for residency in EVERY[1:]:
        if residency.kind == "disk":  # random weights lie in no file
            continue
        latents, _, peak, pinned = denoised(wider, [residency], cuda)
        streamed = (LAYERS - residency.resident_blocks) * block
        weights = whole if residency.kind == "expert" else rest + (2 + residency.resident_blocks) * block
        host = residency.host_experts * whole if residency.kind == "expert" else streamed
        host = 2 * whole if residency == Residency("block", 0, 2) else host
        print(f"{residency}: {peak / MIB:.1f} MiB, of which weights {weights / MIB:.1f}; pinned {pinned / MIB:.1f}")
        assert torch.equal(latents, expected), residency
        # Random numbers are drawn beside their place, 16 MiB at a time and twice.
        assert peak <= weights + work + 40 * MIB
        assert pinned == host


def test_running_out_of_gpu_memory(wider, cuda):
    expected = denoised(wider, EVERY[:1], cuda)[0]
    whole = sum(piece.nbytes for piece in pieces_of(Experts(wider, torch.bfloat16, cuda, None)._empty[HIGH]).values())
    gc.collect()
    torch.cuda.empty_cache()
    heard = Heard()
    try:
        # For one expert and work, not for two; torch's own count begins with what it holds now.
        room = torch.cuda.memory_reserved(cuda) + int(1.7 * whole)
        memory.limit_gpu_memory(cuda, room + memory.ASIDE)
        latents, kind, _, _ = denoised(wider, [Residency("none"), Residency("expert"), Residency("block", 0, 1)], cuda,
                                       reporter=heard)  # fmt: skip
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, cuda)
    print(heard.said)
    assert torch.equal(latents, expected)
    assert kind in ("expert", "block")


def test_a_device_without_a_number():
    """What `--device cuda` means; some of torch's functions refuse it."""
    try:
        memory.limit_gpu_memory(torch.device("cuda"), 64 << 30)
        assert CudaMemory(torch.device("cuda")).rooms()[0].total > 0
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, torch.cuda.current_device())


def test_memory_that_cannot_be_pinned(cuda, monkeypatch):
    """The error is told once, and is not taken for the next kernel's."""
    array, mapped = [memory._mapped(1 << 20)], memory._mapped
    monkeypatch.setattr(memory, "_mapped", lambda nbytes: array[0])
    ours = CudaMemory(cuda)
    first = ours.host(1 << 20)
    assert first.is_pinned()
    with pytest.raises(MemoryError, match="cannot be pinned"):
        ours.host(1 << 20)  # is pinned already
    assert torch.ones(4, device=cuda).sum().item() == 4
    monkeypatch.setattr(memory, "_mapped", mapped)
    del first, array[0]
    other = ours.host(12345)
    other.copy_(torch.from_numpy(np.arange(12345) % 251))
    target = ours.empty(12345)
    ours.move(target, other)
    assert torch.equal(target.cpu(), other)


@pytest.mark.parametrize("name", ["cudnn", "flash", "efficient"])
def test_pytorchs_attention_is_right_here(name, cuda):
    assert choose(name, Shape(4096, 40, 128), cuda, torch.bfloat16) == name


def test_auto_attention(cuda):
    name = choose("auto", Shape(20_000, 40, 128), cuda, torch.bfloat16)
    print(f"auto: {name}")
    assert BACKENDS[name].exact
    present = []
    for other in ("fa3", "fa4"):
        try:
            attention.find(other)
            present.append(other)
        except RequestError as error:
            print(error)
    for other in present:
        assert choose(other, Shape(4096, 40, 128), cuda, torch.bfloat16) == other


TYPED = ["generate", "--ckpt_dir", str(TINY), "--size", "64*48", "--frame_num", "5", "--sample_steps", "3", "--prompt",
         "a ball", "--seed", "3", "--sample_shift", "3", "--attention", "torch"]  # fmt: skip


def test_every_offload_flag_gives_the_same_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    files = []
    for number, words in enumerate((["--offload", "none"], ["--offload", "expert"], ["--offload", "block"],
                                    ["--offload", "disk"], ["--gpu-memory-limit", "4GiB"])):  # fmt: skip
        assert cli.main([*TYPED, "--output", f"{number}.png", *words]) == 0
        assert "GiB GPU" in capsys.readouterr().err
        files.append((tmp_path / f"{number}.png").read_bytes())
    torch.cuda.set_per_process_memory_fraction(1.0, torch.cuda.current_device())
    assert len(set(files)) == 1


def test_bench(capsys):
    assert cli.main(["bench", "--layers", "2", "--size", "256x256", "--frames", "5", "--against", "diffusers",
                     "--no-compile"]) == 0  # fmt: skip
    out = capsys.readouterr().out
    print(out)
    assert "forward, diffusers eager" in out
