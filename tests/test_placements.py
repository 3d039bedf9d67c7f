"""Placements never change the picture, and each is what its peaks of memory say it is: not its name."""

import gc
import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file, save_file

from wan22 import cli, sampling, text_encoder, vae
from wan22.checkpoint import INDEX, find_checkpoint, open_checkpoint
from wan22.config import Lora, Placement, Precision, Request, Residency, RunError
from wan22.experts import Experts
from wan22.load import load_expert
from wan22.lora import Adapters
from wan22.model import Block
from wan22.pipeline import Pipeline
from wan22.report import Reporter
from wan22.residency.chunks import chunk_feed_forward
from wan22.residency.memory import Memory, empty_on_host
from wan22.residency.streaming import evenly, pieces_of
from wan22.sizes import Sizes, lasting_terms, text_terms, total
from wan22.vae_sizes import decode_terms

CPU = torch.device("cpu")
LAYERS = 8
HIGH, LOW = "high_noise_model", "low_noise_model"
# Five steps, the boundary after the third.
REQUEST = Request("a red ball", "blurred", width=32, height=32, num_frames=5, num_steps=5, shift=5.0, seed=7)
EVERY = [
    Residency("none"), Residency("expert"), Residency("expert", 0, 1), Residency("block", 4, 1),
    Residency("block", 0, 1), Residency("block", 0, 2), Residency("disk", 4), Residency("disk"),
]  # fmt: skip


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """The tiny checkpoint with eight blocks, each another's numbers turned over, so that a wrong block is told."""
    folder = tmp_path_factory.mktemp("deep") / "weights"
    shutil.copytree(TINY, folder)
    for name in (HIGH, LOW):
        config = json.loads((folder / name / "config.json").read_text())
        state = {}
        for file in (folder / name).glob("*.safetensors"):
            state |= load_file(file)
            file.unlink()
        for number in range(config["num_layers"], LAYERS):
            for key in [key for key in state if key.startswith(f"blocks.{number % 3}.")]:
                copy = state[key].flip(-1).contiguous()
                state[key.replace(f"blocks.{number % 3}.", f"blocks.{number}.", 1)] = copy
        save_file(state, folder / name / "model.safetensors")
        (folder / name / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(state, "model.safetensors")}))
        (folder / name / "config.json").write_text(json.dumps({**config, "num_layers": LAYERS}))
    return open_checkpoint(folder)


@pytest.fixture(scope="module")
def adapter(deep, tmp_path_factory):
    """A pair of factors on some layers, and a bias's difference."""
    file, generator = tmp_path_factory.mktemp("adapter") / "style.safetensors", torch.Generator().manual_seed(3)
    tensors = {}
    for layer in ("blocks.0.self_attn.q", "blocks.3.cross_attn.k", "blocks.7.ffn.0", "blocks.7.self_attn.v"):
        out, width = deep.experts[HIGH].tensors.shapes[f"{layer}.weight"]
        tensors[f"diffusion_model.{layer}.lora_down.weight"] = torch.randn(4, width, generator=generator)
        tensors[f"diffusion_model.{layer}.lora_up.weight"] = torch.randn(out, 4, generator=generator) / 10
    save_file(tensors, file)
    return file


def denoised(checkpoint, residency, loras=(), memory=None):
    """Latents, the experts and their memory."""
    pipe = Pipeline(checkpoint, Precision("float32"), Placement("cpu"))
    memory = memory or Memory(CPU, has_host=True)
    ladder = residency if isinstance(residency, list) else [residency]
    pipe.experts = Experts(checkpoint, torch.float32, CPU, pipe.adapters, ladder, memory)
    pipe.experts.use = lambda ladder: None
    request = pipe.resolve(Request.from_dict({**REQUEST.to_dict(), "loras": list(loras)}))
    return pipe.denoise(request, Reporter()), pipe.experts, memory


@pytest.fixture(scope="module")
def expected(deep):
    return denoised(deep, Residency("none"))[0]


@pytest.mark.parametrize("residency", EVERY, ids=lambda r: f"{r.kind}-{r.resident_blocks}-{r.host_experts}")
def test_placements_are_bit_identical_and_what_they_say(deep, expected, residency):
    latents, experts, memory = denoised(deep, residency)
    assert torch.equal(latents, expected)
    pieces = pieces_of(experts._empty[HIGH])
    block, rest = pieces[0].nbytes, pieces[-1].nbytes
    whole = rest + LAYERS * block
    device = {"none": 2 * whole, "expert": whole}.get(residency.kind, rest + (2 + residency.resident_blocks) * block)
    one_place = (LAYERS - residency.resident_blocks) * block
    host = {"none": 0, "disk": 0, "expert": residency.host_experts * whole, "block": one_place}[residency.kind]
    host = 2 * whole if residency == Residency("block", 0, 2) else host
    print(f"{residency}: device {memory.on_device.peak:,}, host {memory.on_host.peak:,}, stall {experts.stall:.3f} s")
    assert (memory.on_device.peak, memory.on_host.peak) == (device, host)
    del latents
    experts.release()
    assert (memory.on_device.live, memory.on_host.live) == (0, 0)


@pytest.mark.parametrize("residency", [EVERY[i] for i in (1, 2, 4, 5, 7)], ids=lambda r: f"{r.kind}-{r.host_experts}")
def test_with_adapters(deep, adapter, expected, residency):
    loras = [Lora(str(adapter), 0.8)]
    latents = denoised(deep, Residency("none"), loras)[0]
    assert not torch.equal(latents, expected)
    assert torch.equal(denoised(deep, residency, loras)[0], latents)


def test_the_demo_s_placements_are_bit_identical():
    """Trained weights, of two blocks or more an expert."""
    checkpoint, latents = open_checkpoint(find_checkpoint("demo")), []
    for residency in (Residency("none"), Residency("expert", 0, 1), Residency("block", 2, 1), Residency("block", 0, 2),
                      Residency("disk")):  # fmt: skip
        made, experts, memory = denoised(checkpoint, residency)
        print(f"{residency}: device {memory.on_device.peak:,}, host {memory.on_host.peak:,}")
        latents.append((made, memory.on_device.peak))
        experts.release()
    assert all(torch.equal(made, latents[0][0]) for made, _ in latents)
    peaks = [peak for _, peak in latents]
    assert peaks[0] == 2 * peaks[1]  # each is what it says
    assert peaks[1] > peaks[2] > peaks[3] == peaks[4]


def test_the_other_expert_is_ready_when_its_turn_comes(deep, monkeypatch):
    """With room for both, the steps wait for nothing that the first expert's steps leave time for."""
    adapters = Adapters(deep.experts[HIGH].tensors.shapes, [], TINY)
    experts = Experts(deep, torch.float32, CPU, adapters, [Residency("none")], Memory(CPU))
    experts.get(HIGH)
    experts.expect(LOW)
    experts._coming._thread.join(30)
    monkeypatch.setattr("wan22.residency.streaming.read_state", None)  # nothing is read from here on
    start = time.perf_counter()
    experts.get(LOW)
    print(f"waited {time.perf_counter() - start:.4f} s; stall {experts.stall:.4f} s")
    assert experts.stall < 0.1


def test_weights_are_given_back_without_the_garbage_collector(deep):
    """A reference cycle would hold a whole expert on the device until the collector happens to run."""
    gc.disable()
    try:
        for residency in (Residency("expert"), Residency("block", 2, 1)):
            memory = Memory(CPU, has_host=True)
            experts = Experts(deep, torch.float32, CPU, Adapters({}, [], TINY), [residency], memory)
            experts.get(HIGH)
            experts.release()
            assert (memory.on_device.live, memory.on_host.live) == (0, 0)
    finally:
        gc.enable()


def test_streamed_blocks_are_spread():
    assert evenly(4, 8) == [0, 2, 4, 6]
    assert evenly(2, 3) == [0, 1]


def test_feed_forward_in_chunks(tiny):
    model, x = load_expert(tiny.experts[HIGH], torch.float32, CPU), torch.randn(1, 50, 128)
    whole = model.blocks[0].ffn(x)
    chunk_feed_forward(model, tokens=16)
    assert (model.blocks[0].ffn(x) - whole).abs().max() < 1e-5


@pytest.fixture
def both(deep):
    """A pipeline that has made one video's latents with both experts resident, and its memory."""
    made, memory = Pipeline(deep, Precision("float32"), Placement("cpu")), Memory(CPU, has_host=True)
    made.experts = Experts(deep, torch.float32, CPU, made.adapters, [Residency("none")], memory)
    made.experts.use = lambda ladder: None
    latents = made.denoise(REQUEST, Reporter())
    assert memory.on_device.live == made.experts.bytes
    return made, memory, latents


def room_of(memory, nbytes):
    """A device of so many bytes."""
    memory.free = lambda limit: nbytes - memory.on_device.live


@pytest.mark.parametrize("spare", [0, -1])
def test_both_experts_stay_beside_the_decoder_where_there_is_room(both, spare):
    """And otherwise go, rather than that it decodes in tiles."""
    made, memory, latents = both
    decoder = total(decode_terms(latents.shape, made.sizes.vae_width, (1, 1)))
    room_of(memory, decoder + memory.on_device.live + spare)
    assert made._tiles(latents, torch.float32) == (1, 1)
    assert memory.on_device.live == (made.experts.bytes if spare == 0 else 0)
    # The next video's are read again.
    assert torch.equal(made.denoise(REQUEST, Reporter()), latents)


@pytest.mark.parametrize(("spare", "prompt", "stay"), [(0, "new", True), (-1, "new", False), (-1, "a red ball", True)])
def test_both_experts_stay_beside_the_text_encoder_where_there_is_room(both, monkeypatch, spare, prompt, stay):
    """A prompt that is known needs none."""
    made, memory, _ = both
    text = total(text_terms("device", made.sizes, 4))
    room_of(memory, text + memory.on_device.live + spare)
    seen = []
    encode = made.encode
    monkeypatch.setattr(made, "encode", lambda *args: seen.append(memory.on_device.live) or encode(*args))
    made.experts.begin = lambda *args: None
    request = Request.from_dict({**REQUEST.to_dict(), "prompt": prompt})
    made.denoise(request, Reporter())
    assert seen == [made.experts.bytes if stay else 0]


def test_the_decoder_may_have_the_experts_room(both):
    made, memory, _ = both
    assert made.experts.give_up() is True
    assert memory.on_device.live == 0
    assert made.experts.give_up() is False


def test_a_streamed_text_encoder_leaves_the_host_without_the_garbage_collector(deep, monkeypatch):
    """Or the pinned experts come beside it."""
    empty, storages = text_encoder.empty_on_host, []

    def watched(shape, dtype):
        made = empty(shape, dtype)
        storages.append(made.untyped_storage()._weak_ref())
        return made

    monkeypatch.setattr(text_encoder, "empty_on_host", watched)
    ids = {"x": [5, 6, 1]}
    gc.disable()
    try:
        streamed = text_encoder.encode_all(deep, torch.float32, CPU, ids, "stream", print)
        assert storages
        assert all(map(torch.UntypedStorage._expired, storages))
    finally:
        gc.enable()
    whole = text_encoder.encode_all(deep, torch.float32, CPU, ids, "device", print)
    assert torch.equal(streamed["x"], whole["x"])


def test_prompts_keep_their_keys_and_values_alone(tiny):
    """Packed or not, nothing of the product that they came of."""
    model = load_expert(tiny.experts[HIGH], torch.bfloat16, CPU)
    assert "kv" in model.blocks[0].cross_attn._modules
    with torch.inference_mode():
        kept = model.embed_context(torch.randn(1, 7, tiny.text_encoder.shapes["token_embedding.weight"][1]))
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for pair in kept for one in pair}
    request = Request("x", guidance_high=1.0, guidance_low=1.0)
    said = lasting_terms(request, Sizes.of(tiny), 2)["keys and values of prompts"]
    assert sum(storages.values()) == said


# --- out of memory ---------------------------------------------------------------------------------------------------
def failing(function, at, error=torch.OutOfMemoryError, times=1):
    """A function that fails at its call of this number (from 0) and the `times − 1` that follow."""
    calls = iter(range(sys.maxsize))

    def wrapper(*args, **kwargs):
        if at <= next(calls) < at + times:
            raise error("CUDA out of memory. Tried to allocate 1 byte")
        return function(*args, **kwargs)

    return wrapper


class Listener(Reporter):
    def __init__(self):
        super().__init__()
        self.said = []

    def warn(self, text):
        self.said.append(text)


@pytest.fixture
def pipe(deep):
    made = Pipeline(deep, Precision("float32"), Placement("cpu"))
    made.experts.ladder = [Residency("none"), Residency("expert"), Residency("block", 0, 1), Residency("disk")]
    made.experts.use = lambda ladder: None
    return made


# A step is two passes of eight blocks: in the first expert, in the second one, in both in a row.
@pytest.mark.parametrize(("at", "times", "kinds"), [
    (20, 1, ["expert"]), (16 * 4 + 3, 1, ["expert"]),
    (20, 2, ["expert", "block"]), (20, 3, ["expert", "block", "disk"]),
])  # fmt: skip
def test_out_of_memory_while_denoising(pipe, expected, monkeypatch, at, times, kinds):
    monkeypatch.setattr(Block, "forward", failing(Block.forward, at, times=times))
    heard = Listener()
    assert torch.equal(pipe.denoise(REQUEST, heard), expected)
    assert [text.rpartition(" ")[2] for text in heard.said] == kinds
    assert f"step {at // 16 + 1}" in heard.said[0]


def test_out_of_memory_in_the_solver(pipe, expected, monkeypatch):
    make = sampling.make_solver

    def broken(request):
        solver = make(request)
        solver.convert_model_output = failing(solver.convert_model_output, 2)
        return solver

    monkeypatch.setattr(sampling, "make_solver", broken)
    heard = Listener()
    assert torch.equal(pipe.denoise(REQUEST, heard), expected)
    assert len(heard.said) == 1


def test_out_of_memory_at_the_switch(deep, expected):
    """A device that holds one expert, where two were planned; and one that holds no whole one."""
    pieces = pieces_of(Experts(deep, torch.float32, CPU, Adapters({}, [], TINY))._empty[HIGH])
    whole = sum(piece.nbytes for piece in pieces.values())
    for limit, kind in ((whole + 1000, "expert"), (whole - 1000, "block")):
        ladder = [Residency("none"), Residency("expert"), Residency("block", 0, 1)]
        latents, experts, memory = denoised(deep, ladder, memory=Memory(CPU, limit, has_host=True))
        assert torch.equal(latents, expected)
        assert experts.residency.kind == kind
        assert memory.on_device.peak <= limit


def test_no_host_memory_for_pinned_blocks(deep, expected, monkeypatch):
    monkeypatch.setattr(Memory, "host", failing(Memory.host, 3, MemoryError))
    latents, experts, _ = denoised(deep, [Residency("block", 0, 1), Residency("disk")])
    assert torch.equal(latents, expected)
    assert experts.residency.kind == "disk"


def test_nothing_smaller(pipe, monkeypatch):
    monkeypatch.setattr(Block, "forward", failing(Block.forward, 20, times=9))
    with pytest.raises(RunError, match="out of memory in step 2, with the smallest placement"):
        pipe.denoise(REQUEST, Reporter())


@pytest.mark.parametrize(("times", "said"), [(1, "layer by layer"), (2, "on the CPU")])
def test_out_of_memory_while_encoding(pipe, expected, monkeypatch, times, said):
    encoder = text_encoder.TextEncoder
    monkeypatch.setattr(encoder, "__call__", failing(encoder.__call__, 1, times=times))
    heard = Listener()
    assert torch.equal(pipe.denoise(REQUEST, heard), expected)
    assert said in heard.said[-1]
    assert len(heard.said) == times


# --- at the command line ---------------------------------------------------------------------------------------------
TYPED = ["generate", "--ckpt_dir", str(TINY), "--size", "64*48", "--frame_num", "5", "--sample_steps", "3", "--prompt",
         "a ball", "--seed", "3", "--sample_shift", "3", "--output"]  # fmt: skip
SMALLER = ["--size", "32*32", "--frame_num", "1"]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def main(*words):
        code = cli.main([str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out.strip(), err

    return main


def test_out_of_memory_while_decoding(run, tmp_path, monkeypatch):
    from wan22.video import read_frames

    assert run(*TYPED, "whole.mp4")[0] == 0
    whole = read_frames("whole.mp4")[0].astype(int)
    local = vae.VideoVAE._local
    said = [f"out of memory while decoding: going on {how}" for how in ("without the experts", "in 1 x 2 tiles")]
    for times, name in ((1, "alone.mp4"), (2, "tiles.mp4")):  # both experts were still there
        monkeypatch.setattr(vae.VideoVAE, "_local", failing(local, 1, times=times))  # one chunk is out already
        code, _, err = run(*TYPED, name)
        assert (code, [err.count(one) for one in said]) == (0, [1, times - 1])
        assert abs(read_frames(name)[0].astype(int) - whole).max() <= times - 1
        (tmp_path / name).unlink()

    monkeypatch.setattr(vae.VideoVAE, "_local", failing(local, 1, times=99))
    code, _, err = run(*TYPED, "never.mp4")
    assert (code, "the smallest tiles" in err, "never.state.safetensors" in err) == (1, True, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["never.state.safetensors", "whole.mp4"]

    monkeypatch.setattr(vae.VideoVAE, "_local", local)
    assert run("decode", "never.state.safetensors", "--ckpt_dir", TINY)[:2] == (0, "never.mp4")
    assert (tmp_path / "never.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()


def test_decode_refuses_other_checkpoints_and_unfinished_runs(run, deep, tmp_path, monkeypatch):
    assert run(*TYPED, "v.mp4", *SMALLER, "--keep-latents")[0] == 0
    code, _, err = run("decode", "v.latents.safetensors", "--ckpt_dir", deep.folder)
    assert (code, "another checkpoint" in err) == (2, True)
    assert run("decode", "v.latents.safetensors", "--ckpt_dir", TINY, "--output", "v.mp4")[0] == 2
    assert run("decode", "v.latents.safetensors", "--ckpt_dir", TINY)[:2] == (0, "v-2.mp4")
    assert run("decode", "v.mp4", "--ckpt_dir", TINY)[0] == 2
    monkeypatch.setattr(Block, "forward", failing(Block.forward, 7, times=999))
    code, _, err = run(*TYPED, "w.mp4", *SMALLER)
    assert (code, "the smallest placement" in err, "step 1 of 3" in err) == (1, True, True)
    code, _, err = run("decode", "w.state.safetensors", "--ckpt_dir", TINY)
    assert (code, "1 of 3 steps" in err) == (2, True)


def test_every_offload_flag_gives_the_same_file(run, tmp_path):
    files = []
    for number, words in enumerate((["--offload", "none"], ["--offload_model", "True"], ["--offload", "block"],
                                    ["--offload", "disk", "--t5_cpu", "--gpu_memory_limit", "8GiB"])):  # fmt: skip
        code, _, err = run(*TYPED, f"{number}.mp4", *SMALLER, *words)
        assert (code, "expert switch" in err) == (0, True)
        files.append((tmp_path / f"{number}.mp4").read_bytes())
    assert len(set(files)) == 1


def test_host_memory_by_many_threads():
    """Exactly its size, writable to the last byte, and given back with the last view."""
    made = empty_on_host((3, 5 << 20), torch.bfloat16)
    assert (made.shape, made.dtype, made.untyped_storage().nbytes()) == ((3, 5 << 20), torch.bfloat16, 30 << 20)
    assert not made.any()
    made[-1, -1] = 1
    assert made.sum() == 1
    assert empty_on_host((0, 4), torch.float32).shape == (0, 4)


@pytest.mark.skipif(sys.platform != "linux", reason="torch has it on Linux alone")
@pytest.mark.parametrize("own", [{}, {"PYTORCH_ALLOC_CONF": "x:1"}, {"PYTORCH_CUDA_ALLOC_CONF": "x:1"}])
def test_memory_of_the_gpu_grows_in_place_unless_the_user_says_otherwise(own):
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    environment = {name: value for name, value in os.environ.items() if name not in names} | own
    code = f"import json, os, wan22.pipeline; print(json.dumps([(n, os.environ.get(n)) for n in {names}]))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    expected = own or {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert json.loads(done.stdout) == [[name, expected.get(name)] for name in names]
