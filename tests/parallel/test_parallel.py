"""On CPUs with gloo: every mesh gives the single process's numbers, and every rank has its share of the work."""

import dataclasses
import hashlib
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY
from safetensors.torch import save_file
from together import CPU, run

from wan22.attention import attend
from wan22.checkpoint import Expert, find_checkpoint, open_checkpoint
from wan22.config import Placement, Precision, Request, RequestError, Residency
from wan22.experts import Experts
from wan22.files import reading
from wan22.files.tensor_files import Safetensors
from wan22.load import load_expert
from wan22.lora import Adapters
from wan22.model import TransformerConfig, WanTransformer
from wan22.parallel import Ranks
from wan22.pipeline import Pipeline
from wan22.report import Reporter
from wan22.residency.memory import Memory
from wan22.sampling import evaluate
from wan22.several.launch import Team
from wan22.several.mesh import Mesh, shares
from wan22.several.sharding import sharded_expert
from wan22.several.vae_parallel import decode_together
from wan22.text_encoder import TextEncoder
from wan22.vae import VideoVAE, to_uint8
from wan22.vae_sizes import rank_grid

HIGH, LOW = "high_noise_model", "low_noise_model"
MESHES = {
    2: [(2, 1, 1), (1, 1, 2), (1, 2, 1)],
    3: [(1, 1, 3), (1, 3, 1)],
    4: [(2, 1, 2), (2, 2, 1), (1, 1, 4), (1, 2, 2), (1, 4, 1)],
}
LATENTS = [(3, 6, 10), (1, 2, 10)]  # 45 tokens and 5: neither divides by 2 or 4
HEADS, DEPTH, LAYERS, PATCH = 4, 32, 3, 64


def make_ranks(rank, world, mesh, sharded=False, text=False):
    return Ranks(Team(rank, world, rank, world), Mesh(*mesh), CPU, sharded, text)


def make_experts(checkpoint, ranks, memory=None):
    adapters = Adapters(checkpoint.experts[HIGH].tensors.shapes, [], TINY)
    made = Experts(checkpoint, torch.float32, CPU, adapters, [Residency("expert")], memory or Memory(CPU))
    made.ranks = ranks
    return made


def inputs(shape, text_dim=64, channels=16):
    generator = torch.Generator().manual_seed(7)
    sizes = ((1, channels, *shape), (1, 7, text_dim), (1, 9, text_dim))
    latents, context, negative = (torch.randn(size, generator=generator) for size in sizes)
    return latents, torch.tensor([901.0]), context, negative


@torch.inference_mode()
def velocities(evaluate, model, shape, guided):
    latents, timestep, context, negative = inputs(shape, model.config.text_dim)
    context, negative = (model.embed_context(x) for x in (context, negative))
    both = evaluate(model, latents, timestep, context, negative if guided else None)
    return [velocity for velocity in both if velocity is not None]


def expected_bytes(mesh, rank, tokens, velocity, guided):
    """What a rank sends in the passes of one step, in float32; and its tokens and heads."""
    ulysses = mesh.place(rank)[2]
    rings, order = mesh.ring, rank % mesh.sequence
    if mesh.guidance == 2 and not guided:
        rings, order = 2 * mesh.ring, rank
    lengths = shares(tokens, rings * mesh.ulysses)
    places = [sum(lengths[place * mesh.ulysses : (place + 1) * mesh.ulysses]) for place in range(rings)]
    own, heads, place = lengths[order], shares(HEADS, mesh.ulysses)[ulysses], order // mesh.ulysses
    block = 3 * own * (HEADS - heads) * DEPTH + (places[place] - own) * heads * DEPTH
    block += (rings - 1) * 2 * max(places) * heads * DEPTH
    one = LAYERS * block + (len(lengths) - 1) * max(lengths) * PATCH
    passes = 2 if guided and mesh.guidance == 1 else 1
    return own, heads, 4 * (passes * one + (velocity if guided and mesh.guidance == 2 else 0))


def _velocity(rank, world, meshes, sharded):
    checkpoint, found = open_checkpoint(TINY), []
    alone = load_expert(checkpoint.experts[HIGH], torch.float32, CPU)
    for mesh in meshes:
        ranks = make_ranks(rank, world, mesh, sharded)
        model = make_experts(checkpoint, ranks).get(HIGH)
        for shape in LATENTS:
            for guided in (True, False):
                expected = velocities(evaluate, alone, shape, guided)
                ranks.counts.bytes_sent = ranks.counts.passes = 0
                ours = velocities(ranks.evaluate, model, shape, guided)
                assert len(ours) == len(expected)
                largest = max((one - two).abs().max().item() for one, two in zip(ours, expected, strict=True))
                assert min(velocity.std() for velocity in expected) > 0.1
                counts = ranks.counts
                tokens = shape[0] * shape[1] * shape[2] // 4
                wanted = expected_bytes(Mesh(*mesh), rank, tokens, expected[0].numel(), guided)
                assert (counts.tokens, counts.heads, counts.bytes_sent) == wanted, (mesh, shape, guided)
                assert counts.tokens * counts.heads > 0
                digest = hashlib.sha256(b"".join(velocity.numpy().tobytes() for velocity in ours)).hexdigest()
                found.append((mesh, shape, guided, largest, digest))
    return found


@pytest.mark.parametrize("world", MESHES)
@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_one_velocity(world, sharded):
    """The single process's to 3e-5, and the same bits on every rank."""
    results = run(world, _velocity, MESHES[world], sharded)
    assert all([line[:3] + line[4:] for line in result] == [line[:3] + line[4:] for line in results[0]]
               for result in results)  # fmt: skip
    for mesh, shape, guided, largest, _ in results[0]:
        print(f"{Mesh(*mesh)}; {shape}, {'guided' if guided else 'one branch'}: largest difference {largest:.1e}")
        assert largest < 3e-5


def _attended(rank, world, mesh, batch):
    q, k, v = torch.randn(3, batch, 11, HEADS, DEPTH, generator=torch.Generator().manual_seed(5))
    ranks, seen = make_ranks(rank, world, mesh), []

    def backend(*qkv):
        seen.append(all(x.data_ptr() == qkv[0].data_ptr() + i * x.shape[2] * DEPTH * 4 for i, x in enumerate(qkv)))
        return attend(*qkv)

    own = ranks.attend(backend, *(ranks._own(x, 1) for x in (q, k, v)))
    return (own - ranks._own(attend(q, k, v), 1)).abs().max().item(), seen


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("mesh", [(1, 1, 3), (1, 2, 2)], ids=str)
def test_attention_of_samples_together(mesh, batch):
    """The model has one at a time, whose q, k and v are attended to as they came, side by side."""
    for largest, in_place in run(Mesh(*mesh).world, _attended, mesh, batch):
        assert largest < 1e-5
        assert mesh[1] > 1 or all(in_place)


def _in_bf16(rank, world, mesh):
    checkpoint, found = open_checkpoint(TINY), []
    alone = load_expert(checkpoint.experts[HIGH], torch.bfloat16, CPU)
    for sharded in (False, True):
        ranks = make_ranks(rank, world, mesh, sharded)
        adapters = Adapters(checkpoint.experts[HIGH].tensors.shapes, [], TINY)
        experts = Experts(checkpoint, torch.bfloat16, CPU, adapters, [Residency("expert")], Memory(CPU))
        experts.ranks = ranks
        model = experts.get(HIGH)
        both = [velocities(how, at, LATENTS[0], True) for how, at in ((ranks.evaluate, model), (evaluate, alone))]
        pairs = zip(*both, strict=True)
        found.append(max((ours - expected).norm() / expected.norm() for ours, expected in pairs).item())
        kinds = {parameter.dtype for parameter in model.parameters()}
        assert kinds == {torch.bfloat16, torch.float32}  # of a block together: gathered as they are, in one message
    return found


def test_blocks_of_two_dtypes():
    """As on a GPU: products in bf16, the rest in float32. What rounds is another height of the products alone."""
    for found in run(2, _in_bf16, (1, 1, 2)):
        assert max(found) < 1e-2


def test_a_rank_that_does_not_exchange_is_told():
    """The test of velocities can fail: the keys of one rank alone are not all keys."""

    def _broken(rank, world):
        checkpoint = open_checkpoint(TINY)
        ranks = make_ranks(rank, world, (1, 1, 2))
        model = make_experts(checkpoint, ranks).get(HIGH)
        for block in model.blocks:
            block.self_attn.attend = block.self_attn.attend.args[0]
        alone = load_expert(checkpoint.experts[HIGH], torch.float32, CPU)
        ours, expected = (velocities(how, at, LATENTS[0], False)
                          for how, at in ((ranks.evaluate, model), (evaluate, alone)))  # fmt: skip
        return (ours[0] - expected[0]).abs().max().item()

    assert min(run(2, _broken)) > 1e-3


# --- whole runs ------------------------------------------------------------------------------------------------------
REQUEST = Request("a red ball", "blurred", width=48, height=32, num_frames=5, num_steps=5, shift=5.0, seed=7)
# The low-noise steps have one branch; UniPC is left for another solver once.
ONE_BRANCH = dataclasses.replace(REQUEST, guidance_low=1.0, solver="dpm++")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    file, generator = tmp_path_factory.mktemp("adapter") / "style.safetensors", torch.Generator().manual_seed(3)
    shapes, tensors = open_checkpoint(TINY).experts[HIGH].tensors.shapes, {}
    for layer in ("blocks.0.self_attn.q", "blocks.1.cross_attn.k", "blocks.2.ffn.0", "blocks.2.self_attn.v"):
        out, width = shapes[f"{layer}.weight"]
        tensors[f"diffusion_model.{layer}.lora_down.weight"] = torch.randn(4, width, generator=generator)
        tensors[f"diffusion_model.{layer}.lora_up.weight"] = torch.randn(out, 4, generator=generator) / 10
    save_file(tensors, file)
    return str(file)


def requests(adapter):
    return [REQUEST, ONE_BRANCH, Request.from_dict({**REQUEST.to_dict(), "loras": [{"file": adapter}]})]


def whole_run(checkpoint, request, ranks, placement=Placement("cpu")):  # noqa: B008
    placement = dataclasses.replace(placement, prompt_cache=False)
    pipe = Pipeline(checkpoint, Precision("float32"), placement, ranks=ranks)
    request = pipe.resolve(request)
    latents = pipe.denoise(request, Reporter())
    return latents, list(pipe.decode(latents))


def _runs(rank, world, mesh, sharded, adapter):
    checkpoint, ranks = open_checkpoint(TINY), make_ranks(rank, world, mesh, sharded, sharded)
    return [whole_run(checkpoint, request, ranks, Placement("cpu", offload))
            for request in requests(adapter) for offload in ("expert", "none")]  # fmt: skip


@pytest.fixture(scope="module")
def expected(adapter):
    alone = [whole_run(open_checkpoint(TINY), request, None) for request in requests(adapter)]
    assert (alone[0][0] - alone[2][0]).abs().max() > 1e-2  # the adapter does something
    return alone


@pytest.mark.parametrize(("mesh", "sharded"), [
    ((2, 1, 1), False), ((1, 1, 2), True), ((1, 1, 3), False), ((2, 1, 2), True), ((2, 2, 1), False),
], ids=str)  # fmt: skip
def test_a_whole_run(mesh, sharded, adapter, expected):
    """Latents to 1e-4, whatever is asked for; the frames come to the first rank alone, and are the same."""
    world = Mesh(*mesh).world
    results = run(world, _runs, mesh, sharded, adapter)
    for number, (latents, frames) in enumerate(results[0]):
        wanted, chunks = expected[number // 2]
        assert all(torch.equal(result[number][0], latents) for result in results)
        assert all(result[number][1] == [] for result in results[1:])
        largest = (latents - wanted).abs().max().item()
        apart = np.concatenate(frames).astype(int) - np.concatenate(chunks)
        print(f"{Mesh(*mesh)}: latents {largest:.1e}; frames {abs(apart).max()} of 255")
        assert largest < 1e-4
        assert abs(apart).max() <= 1


def test_the_demo():
    """Trained weights, where the checkout has them."""
    try:
        checkpoint = open_checkpoint(find_checkpoint("demo"))
    except RequestError as error:
        pytest.skip(f"no demo: {error}")
    request = Request("a red ball", "", width=64, height=64, num_frames=5, num_steps=4, shift=5.0, seed=1)
    alone = whole_run(checkpoint, request, None)[0]

    def _demo(rank, world, mesh):
        return whole_run(open_checkpoint(find_checkpoint("demo")), request, make_ranks(rank, world, mesh))[0]

    for mesh in ((2, 1, 1), (1, 1, 2), (1, 1, 3), (2, 2, 1)):
        largest = max((latents - alone).abs().max().item() for latents in run(Mesh(*mesh).world, _demo, mesh))
        print(f"{Mesh(*mesh)}: {largest:.1e}")
        assert largest < 1e-4


def _demo_velocity(rank, world, sharded):
    checkpoint, found = open_checkpoint(find_checkpoint("demo")), []
    for name in checkpoint.experts:
        alone = load_expert(checkpoint.experts[name], torch.float32, CPU)
        expected = velocities(evaluate, alone, LATENTS[0], True)
        assert min(velocity.std() for velocity in expected) > 0.1
        for mesh in MESHES[world]:
            ranks = make_ranks(rank, world, mesh, sharded)
            ours = velocities(ranks.evaluate, make_experts(checkpoint, ranks).get(name), LATENTS[0], True)
            largest = max((one - two).abs().max().item() for one, two in zip(ours, expected, strict=True))
            found.append((mesh, name, largest, ranks.counts.tokens * ranks.counts.heads))
    return found


@pytest.mark.parametrize(("world", "sharded"), [(2, False), (3, True), (4, True)])
def test_one_velocity_of_the_demo(world, sharded):
    """Trained weights, both experts, every mesh of so many; heads that do not divide by four."""
    for result in run(world, _demo_velocity, sharded):
        for mesh, name, largest, work in result:
            print(f"{Mesh(*mesh)}; {name}: largest difference {largest:.1e}")
            assert largest < 3e-5
            assert work > 0


# --- weights ---------------------------------------------------------------------------------------------------------
def _loaded(rank, world, sharded):
    """Bytes read from the expert's files, this rank's part of it in memory, and the most that all of it took."""
    read, fill = [], reading._Lane._fill

    def counted(lane, offset, array):
        read.append(len(array))
        fill(lane, offset, array)

    reading._Lane._fill = counted
    checkpoint, memory = open_checkpoint(TINY), Memory(CPU, has_host=True)
    experts = make_experts(checkpoint, make_ranks(rank, world, (1, 1, world), sharded), memory)
    model = experts.get(HIGH)
    held = sum(parameter.to_local().nbytes if sharded else parameter.nbytes for parameter in model.parameters())
    velocities(experts.ranks.evaluate, model, LATENTS[0], True)
    del model
    experts.release()
    return sum(read), held, memory.on_device.peak, memory.on_host.peak, memory.on_device.live


@pytest.mark.parametrize("world", [2, 3, 4])
def test_each_rank_reads_and_keeps_its_part(world):
    whole = sum(open_checkpoint(TINY).experts[HIGH].tensors.sizes.values())
    results = run(world, _loaded, True)
    print(f"whole {whole:,}; read, held, most on the device, on the host, left: {results}")
    assert sum(read for read, *_ in results) == whole  # no byte twice, none left out
    assert sum(held for _, held, *_ in results) == whole
    assert sum(peak for _, _, peak, *_ in results) == whole  # as it was taken: nothing whole was there in between
    assert max(read for read, *_ in results) < 1.1 * whole / world + 4096
    assert {left for *_, left in results} == {0}
    assert {host for *_, host, _ in results} == {0}


@pytest.mark.parametrize("world", [2, 3])
def test_copies_take_no_memory_of_the_host(world):
    """Nor is a byte read twice, but for tensors whose rows do not divide."""
    results = run(world, _loaded, False)
    tensors = open_checkpoint(TINY).experts[HIGH].tensors
    whole = sum(tensors.sizes.values())
    assert [(held, host, left) for _, held, _, host, left in results] == [(whole, 0, 0)] * world
    odd = sum(size for name, size in tensors.sizes.items() if tensors.shapes[name][0] % world)
    assert [read for read, *_ in results] == [odd + (whole - odd) // world] * world
    print(f"of {whole:,} bytes each of {world} reads {results[0][0]:,}")


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """An expert of 138 MB: more than what Python and torch take by the way."""
    config = TransformerConfig(dim=512, ffn_dim=2048, num_heads=4, num_layers=8, text_dim=64)
    model = WanTransformer(config)
    model.init_weights()
    file = tmp_path_factory.mktemp("large") / "expert.safetensors"
    save_file(model.state_dict(), file)
    return Expert(HIGH, Safetensors(file), dataclasses.asdict(config))


def _host_memory():
    """Bytes of this process's memory now, and the most since this was last asked."""
    with open("/proc/self/status") as file:
        lines = dict(line.split(":", 1) for line in file)
    now, most = (int(lines[name].split()[0]) << 10 for name in ("VmRSS", "VmHWM"))
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # proc(5): the peak begins anew
    return now, most


def _grown(rank, world, expert):
    """The most that this rank's memory grew by, while an expert was loaded."""
    ranks = make_ranks(rank, world, (1, 1, world), True)
    make_experts(open_checkpoint(TINY), ranks).get(HIGH)  # what torch imports and keeps with the first
    before = _host_memory()[0]
    _, fill = sharded_expert(expert, torch.float32, "torch", (), Memory(CPU), world)
    fill(lambda: False)
    return _host_memory()[1] - before


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="Linux tells it")
@pytest.mark.parametrize("world", [2, 4])
def test_all_ranks_together_hold_one_copy(large, world):
    """As the system counts it, at the peak; a rank has a few buffers beside."""
    whole, grown = sum(large.tensors.sizes.values()), run(world, _grown, large)
    print(f"{[f'{n >> 20} MiB' for n in grown]}, all {sum(grown) / whole:.2f} of {whole >> 20} MiB")
    assert whole > 100 << 20
    assert sum(grown) < whole + world * (40 << 20)


def _encoded(rank, world, ids):
    encoder = TextEncoder(open_checkpoint(TINY), torch.float32, CPU, ranks=world)
    held = sum(parameter.to_local().nbytes for parameter in encoder.model.parameters())
    return [encoder(tokens) for tokens in ids], held


@pytest.mark.parametrize("world", [2, 3])
def test_the_text_encoder_in_parts(world):
    ids = [[5, 9, 31, 1], list(range(3, 40))]
    alone = TextEncoder(open_checkpoint(TINY), torch.float32, CPU)
    # One of its tensors has two names.
    whole = sum({tensor.data_ptr(): tensor.nbytes for tensor in alone.model.parameters()}.values())
    results = run(world, _encoded, ids)
    assert all(torch.equal(ours, alone(tokens)) for contexts, _ in results
               for ours, tokens in zip(contexts, ids, strict=True))  # fmt: skip
    assert sum(held for _, held in results) == whole
    assert max(held for _, held in results) < 1.2 * whole / world


# --- decoding --------------------------------------------------------------------------------------------------------
CACHED = dataclasses.replace(REQUEST, num_steps=12)


def cached_run(checkpoint, ranks, weights="float32"):
    pipe = Pipeline(checkpoint, Precision(weights, step_cache=2.0), Placement("cpu", prompt_cache=False), ranks=ranks)
    request, heard = pipe.resolve(CACHED), Listener()
    return pipe.denoise(request, heard), heard.skipped


class Listener(Reporter):
    skipped = None

    def note(self, text, **data):
        self.skipped = data.get("skipped", self.skipped)


def _cached(rank, world, mesh, sharded):
    return cached_run(open_checkpoint(TINY), make_ranks(rank, world, mesh, sharded))


@pytest.mark.parametrize(("mesh", "sharded"), [((2, 1, 1), False), ((1, 1, 2), True), ((2, 1, 2), False)], ids=str)
def test_all_skip_the_same_steps(mesh, sharded):
    """The step cache's decision is one: that of the first branch's tokens together."""
    wanted, skipped = cached_run(open_checkpoint(TINY), None)
    assert 0 < skipped < CACHED.num_steps
    for latents, ours in run(Mesh(*mesh).world, _cached, mesh, sharded):
        assert ours == skipped
        assert (latents - wanted).abs().max() < 1e-3


def _in_8_bits(rank, world, mesh):
    pipe = Pipeline(open_checkpoint(TINY), Precision("fp8"), Placement("cpu"), ranks=make_ranks(rank, world, mesh))
    return pipe.denoise(pipe.resolve(REQUEST), Reporter())


def test_products_in_8_bits():
    """Whole experts, of which each rank reads its part; a token's scale is its own, wherever it is computed."""
    pipe = Pipeline(open_checkpoint(TINY), Precision("fp8"), Placement("cpu"))
    wanted = pipe.denoise(pipe.resolve(REQUEST), Reporter())
    for mesh in ((2, 1, 1), (1, 1, 2)):
        for latents in run(2, _in_8_bits, mesh):
            assert (latents - wanted).norm() / wanted.norm() < 0.02
    ranks = SimpleNamespace(device=CPU, shard_experts=True)
    with pytest.raises(RequestError, match="--dit_fsdp goes with no fp8 weights"):
        Pipeline(open_checkpoint(TINY), Precision("fp8"), Placement("cpu"), ranks=ranks)


def _decoded(rank, world, grid):
    latents = torch.randn(16, 3, 6, 11, generator=torch.Generator().manual_seed(2))
    vae, areas, local = VideoVAE(open_checkpoint(TINY), CPU), [], VideoVAE._local

    def counted(self, x, cache, first):
        areas.append(x.shape[-1] * x.shape[-2])
        return local(self, x, cache, first)

    VideoVAE._local = counted
    chunks = list(decode_together(vae, latents, grid, make_ranks(rank, world, (1, 1, world))))
    return chunks, sum(areas)


@pytest.mark.parametrize(("world", "grid"), [(2, None), (3, None), (4, None), (2, (2, 3)), (3, (1, 2))])
def test_frames_from_all_ranks(world, grid):
    latents = torch.randn(16, 3, 6, 11, generator=torch.Generator().manual_seed(2))
    expected = np.concatenate([to_uint8(chunk) for chunk in VideoVAE(open_checkpoint(TINY), CPU).decode(latents)])
    results = run(world, _decoded, grid or rank_grid(latents.shape, world))
    frames = np.concatenate(results[0][0])
    assert frames.shape == expected.shape == (9, 48, 88, 3)
    assert abs(frames.astype(int) - expected).max() <= 1
    assert [chunks for chunks, _ in results[1:]] == [[]] * (world - 1)
    working = [area > 0 for _, area in results]
    assert sum(working) == min(world, np.prod(grid or (world, 1)))


@pytest.mark.multigpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus(tmp_path):
    """NCCL, the fused kernels, `fully_shard`: the same video as one GPU's, to bf16's rounding, by every mesh.

    All are run at once: nearly all that one takes is its start, of two processes with their libraries and groups."""
    import subprocess
    import sys
    import time
    from concurrent.futures import ThreadPoolExecutor

    from wan22.compare import compare

    typed = [sys.executable, "-m", "wan22", "generate", "--ckpt_dir", str(TINY), "--size", "128*96", "--frame_num", "9",
             "--sample_steps", "6", "--sample_shift", "5", "--prompt", "a ball", "--seed", "3", "--attention", "torch",
             "--keep-latents", "--dtype", "float32"]  # fmt: skip
    ways = {"one": [], "guidance": ["--gpus", "2"], "ulysses": ["--gpus", "2", "--ulysses_size", "2"],
            "ring": ["--gpus", "2", "--ulysses_size", "1", "--ring_size", "2", "--guidance", "1"],
            "sharded": ["--gpus", "2", "--dit_fsdp", "--t5_fsdp"], "alone": ["--guidance", "1"]}  # fmt: skip

    def make(name):
        words, began = [*typed, *ways[name], "--output", str(tmp_path / f"{name}.png")], time.monotonic()  # no ffmpeg
        done = subprocess.run(words, capture_output=True, text=True)
        return name, done, time.monotonic() - began

    with ThreadPoolExecutor(len(ways)) as together:
        for name, done, seconds in together.map(make, ways):
            assert done.returncode == 0, f"{name}: {done.stderr}"
            print(f"{name}: {seconds:.0f} s; {' '.join(done.stderr.rpartition('encode the text')[2].split())}")
    for name in ways:
        other = "alone" if name == "ring" else "one"
        if name not in ("one", "alone"):
            files = [str(tmp_path / f"{file}.latents.safetensors") for file in (other, name)]
            found = compare(*files).series[0]
            print(f"{name}: {found.name} {found.overall:.1e}")
            assert found.overall < 1e-3
