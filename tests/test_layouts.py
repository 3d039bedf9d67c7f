"""Every layout that a checkpoint may have, written by the libraries it comes from, gives the published layout's
latents; and what is not such a checkpoint is told in a line."""

import json
import os
import shutil
import struct

import checkpoints as made
import gguf
import numpy as np
import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file, save_file

from wan22.checkpoint import Parts, open_checkpoint
from wan22.cli import main
from wan22.config import Precision, Request, RequestError
from wan22.files.gguf_files import Gguf
from wan22.files.layouts import layout_of
from wan22.files.tensor_names import published_vae_name, vae_name
from wan22.pipeline import Pipeline
from wan22.report import Reporter

HIGH, LOW = made.EXPERTS
# One step an expert: 999 and 923 at shift 12, the boundary between them.
REQUEST = Request("a red ball", "blurred", width=32, height=32, num_frames=5, num_steps=2, boundary=0.95, seed=1)


@pytest.fixture(scope="module")
def experts():
    return {name: made.expert(seed) for seed, name in enumerate(made.EXPERTS)}


@pytest.fixture(scope="module")
def base(experts, tmp_path_factory):
    return made.published(tmp_path_factory.mktemp("base") / "weights", experts)


@pytest.fixture(scope="module")
def diffusers(experts, tmp_path_factory):
    return made.diffusers(tmp_path_factory.mktemp("diffusers") / "weights", experts)


def run(folder, dtype="float32", **parts):
    """Latents and frames."""
    checkpoint = open_checkpoint(folder, parts=Parts(**{role: str(path) for role, path in parts.items()}))
    pipeline = Pipeline(checkpoint, Precision(dtype))
    latents = pipeline.denoise(pipeline.resolve(REQUEST), Reporter())
    return latents, np.concatenate(list(pipeline.decode(latents)))


@pytest.fixture(scope="module")
def expected(base):
    return {dtype: run(base, dtype) for dtype in ("float32", "bf16")}


def same(ours, theirs):
    return torch.equal(ours[0], theirs[0]) and np.array_equal(ours[1], theirs[1])


def relative(ours, theirs):
    error = ((ours[0] - theirs[0]).norm() / theirs[0].norm()).item()
    print(f"relative error of the latents {error:.2e}")
    return error


def pair(tmp_path, write):
    """Both experts written by `write(table, path)` → the flags' paths."""
    roles = zip(("high_noise", "low_noise"), made.EXPERTS, strict=True)
    return {role: write(name, tmp_path / f"{role}.safetensors") for role, name in roles}


# --- whole folders ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_diffusers(diffusers, expected, dtype):
    assert same(run(diffusers, dtype), expected[dtype])


def test_diffusers_recipe(diffusers, experts, tmp_path):
    """Its boundary is used, its scheduler's shift is not; both folders' order is high, low."""
    checkpoint = open_checkpoint(diffusers)
    assert layout_of(checkpoint.experts[HIGH].tensors) == "Diffusers"
    assert checkpoint.boundary == 0.875
    other = shutil.copytree(diffusers, tmp_path / "other")
    index = json.loads((other / "model_index.json").read_text())
    (other / "model_index.json").write_text(json.dumps({**index, "boundary_ratio": 0.9}))
    pipeline = Pipeline(open_checkpoint(other))
    request = pipeline.request("x")
    assert (request.boundary, request.shift, request.guidance_low) == (0.9, 12.0, 3.0)
    assert pipeline.resolve(Request("x")).boundary == 0.9
    assert pipeline.resolve(Request("x", boundary=0.875)).boundary == 0.875, "as asked for, also where that is usual"


@pytest.mark.parametrize("stem", ["models_t5_umt5-xxl-enc-bf16", "Wan2.1_VAE"])
def test_safetensors_under_published_names(base, expected, tmp_path, stem):
    folder = shutil.copytree(base, tmp_path / "weights")
    table = torch.load(folder / f"{stem}.pth", weights_only=True)
    (folder / f"{stem}.pth").unlink()
    save_file(table, folder / f"{stem}.safetensors")
    assert same(run(folder), expected["float32"])


# --- one file an expert ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_single_files(base, experts, expected, tmp_path, prefix, dtype):
    """The same numbers, whatever they are stored as: float16 and bfloat16 meet a published checkpoint rounded so."""

    def write(name, path):
        save_file({prefix + key: tensor.to(dtype) for key, tensor in experts[name].items()}, path)
        return path

    ours = run(base, **pair(tmp_path, write))
    if dtype == torch.float32:
        assert same(ours, expected["float32"])
    rounded = {name: {key: t.to(dtype).float() for key, t in table.items()} for name, table in experts.items()}
    assert same(ours, run(made.published(tmp_path / "rounded", rounded)))


def test_without_a_base(base, expected, tmp_path):
    """Every part named, the folders of other layouts among them; nothing of a path in the record or the identity."""
    files = {"text_encoder": "models_t5_umt5-xxl-enc-bf16.pth", "vae": "Wan2.1_VAE.pth", "tokenizer": "google/umt5-xxl"}
    parts = {"high_noise": base / HIGH, "low_noise": base / LOW, **{role: base / file for role, file in files.items()}}
    assert same(run(None, **parts), expected["float32"])
    checkpoint = open_checkpoint(None, parts=Parts(**{role: str(path) for role, path in parts.items()}))
    assert checkpoint.identity() == open_checkpoint(base).identity()
    record = json.dumps(Pipeline(checkpoint).record(REQUEST))
    assert str(base) not in record
    assert base.parent.name not in record
    moved = shutil.copytree(base, tmp_path / "moved")
    assert open_checkpoint(moved).identity() == checkpoint.identity()


def test_parts_of_whole_checkpoints(base, diffusers, expected):
    assert same(run(base, high_noise=diffusers, vae=diffusers, text_encoder=diffusers), expected["float32"])
    assert same(run(diffusers, low_noise=base / LOW, tokenizer=base), expected["float32"])


@pytest.mark.parametrize("role", ["high_noise", "low_noise", "text_encoder", "vae"])
def test_identity_covers_every_part(base, experts, tmp_path, role):
    path = tmp_path / "other.safetensors"
    table = {"text_encoder": made.text_encoder, "vae": made.vae}.get(role, lambda: dict(made.expert(7)))()
    name = next(name for name in table if name.endswith("weight"))
    table[name] = table[name] * 2
    save_file(table, path)
    assert open_checkpoint(base, parts=Parts(**{role: str(path)})).identity() != open_checkpoint(base).identity()


def test_heads_that_the_metadata_tells(experts, tmp_path, base):
    path = tmp_path / "4-heads.safetensors"
    save_file(experts[HIGH], path, metadata={"config": json.dumps({"num_heads": 4})})
    with pytest.raises(RequestError, match="the experts differ: num_heads is 4"):
        open_checkpoint(base, parts=Parts(high_noise=str(path)))


@pytest.mark.parametrize("start", [b"PK", b"\x80\x02"])
def test_a_length_that_looks_like_another_format(base, experts, expected, tmp_path, start):
    """A safetensors file begins with its header's length, whose bytes may be a zip's or a pickle's first ones."""
    path = tmp_path / "expert"
    save_file(experts[HIGH], path, metadata={"x": ""})
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    wanted = next(n for n in range(length, 1 << 24) if n.to_bytes(8, "little").startswith(start))
    path.write_bytes(wanted.to_bytes(8, "little") + raw[8 : 8 + length].ljust(wanted) + raw[8 + length :])
    assert path.read_bytes().startswith(start)
    assert same(run(base, high_noise=path), expected["float32"])


# --- fp8 -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("scheme", "dtype", "rows", "prefix"),
    [
        ("old", torch.float8_e4m3fn, False, ""),
        ("old", torch.float8_e5m2, False, "model.diffusion_model."),
        ("new", torch.float8_e4m3fn, False, "model.diffusion_model."),
        ("new", torch.float8_e4m3fn, True, ""),
        ("metadata", torch.float8_e4m3fn, True, "model.diffusion_model."),
    ],
)
def test_scaled_fp8(base, experts, expected, tmp_path, scheme, dtype, rows, prefix):
    meant = {}

    def write(name, path):
        stored, metadata, meant[name] = made.scaled_fp8(experts[name], scheme, dtype, rows, prefix)
        save_file(stored, path, metadata=metadata)
        return path

    flags = pair(tmp_path, write)
    reference = made.published(tmp_path / "meant", meant)
    ours = run(base, **flags)
    assert same(ours, run(reference))
    assert same(run(base, "bf16", **flags), run(reference, "bf16"))
    # Three bits of mantissa are 2.6 % a weight on average, two are 5.3 %.
    assert relative(ours, expected["float32"]) < (0.05 if dtype == torch.float8_e4m3fn else 0.1)


def test_plain_fp8(base, experts, tmp_path):
    """Files that were only cast exist, and say nothing of scales."""
    cast = {name: {key: t.to(torch.float8_e4m3fn) if t.ndim == 2 else t for key, t in table.items()}
            for name, table in experts.items()}  # fmt: skip
    flags = pair(tmp_path, lambda name, path: save_file(cast[name], path) or path)
    meant = {name: {key: tensor.float() for key, tensor in table.items()} for name, table in cast.items()}
    assert same(run(base, **flags), run(made.published(tmp_path / "meant", meant)))


# --- GGUF ------------------------------------------------------------------------------------------------------------
KINDS = {"F16": 3e-4, "BF16": 3e-3, "Q8_0": 8e-3, "Q5_1": 6e-2, "Q4_0": 0.15, "Q4_K": None, "Q6_K": None}


@pytest.mark.parametrize(("kind", "most"), KINDS.items())
def test_gguf(base, experts, expected, tmp_path, kind, most):
    meant, flags = {}, {}
    for role, name in zip(("high_noise", "low_noise"), made.EXPERTS, strict=True):
        flags[role] = tmp_path / f"{role}.gguf"
        meant[name] = made.gguf_file(flags[role], experts[name], kind, fold=kind == "Q8_0")
    reference = made.published(tmp_path / "meant", meant)
    ours = run(base, **flags)
    assert same(ours, run(reference))
    if most:
        assert relative(ours, expected["float32"]) < most
    if kind == "Q8_0":
        assert same(run(base, "bf16", **flags), run(reference, "bf16"))


def hostile_gguf(values=b"", keys=0, name=b"", tensors=0):
    head = b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + values
    return head + struct.pack("<Q", len(name)) + name + struct.pack("<IQ", 9, 1) + bytes(64)


@pytest.mark.parametrize("content", [
    hostile_gguf(struct.pack("<Q", 1) + b"a" + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000, keys=1),
    hostile_gguf(name=b"\x1b[2J\nblocks", tensors=1),
    hostile_gguf(name=b"a" * 5000, tensors=1),
    hostile_gguf(tensors=1 << 60),
    b"GGUF" + bytes(2),
])  # fmt: skip
def test_a_hostile_gguf_is_told_in_one_line(capsys, tmp_path, content):
    (tmp_path / "a.gguf").write_bytes(content)
    assert main(["show", str(tmp_path / "a.gguf")]) == 2
    said = capsys.readouterr().err
    assert "broken GGUF header" in said
    assert said.count("\n") == 1
    assert said[:-1].isprintable()


def test_gguf_vocabularies_are_skipped(tmp_path):
    """What a umt5 file carries beside its weights: 256,384 tokens, over which the package's own reader takes 48 s."""
    path = tmp_path / "vocabulary.gguf"
    writer = gguf.GGUFWriter(path, "t5encoder")
    writer.add_array("tokenizer.ggml.tokens", [f"token {i}" for i in range(50_000)])
    writer.add_array("tokenizer.ggml.scores", [0.5] * 50_000)
    writer.add_uint32("t5encoder.block_count", 24)
    writer.add_tensor("x", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = Gguf(path)
    target = torch.empty(2, 3)
    file.read({"x": target})
    assert (file.architecture, file.metadata["t5encoder.block_count"], file.shapes) == ("t5encoder", 24, {"x": (2, 3)})
    assert torch.equal(target, torch.arange(6.0).view(2, 3))


# --- text encoder and VAE --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", ["transformers, shards", "transformers, .bin", "with its alias", "with a tokenizer"])
def test_text_encoder(base, expected, tmp_path, form):
    path = tmp_path / "text_encoder"
    model = made.transformers_text_encoder()
    table = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if form == "transformers, shards":
        model.save_pretrained(path, max_shard_size="100KB")
        assert len(list(path.glob("*.safetensors"))) > 1
    elif form == "transformers, .bin":
        path.mkdir()
        torch.save(table, path / "pytorch_model.bin")
    elif form == "with its alias":
        assert "encoder.embed_tokens.weight" in table
        save_file({**table, "decoder.block.0.x": torch.zeros(3), "lm_head.weight": torch.zeros(3)}, path)
    else:
        table.pop("shared.weight")
        save_file({**table, "spiece_model": torch.zeros(99, dtype=torch.uint8)}, path)
    assert same(run(base, text_encoder=path), expected["float32"])


@pytest.mark.parametrize("scheme", ["old", "new"])
def test_text_encoder_scaled_fp8(base, expected, tmp_path, scheme):
    table = {name: tensor.clone() for name, tensor in made.transformers_text_encoder().state_dict().items()}
    del table["encoder.embed_tokens.weight"]
    layers = [name.removesuffix(".weight") for name in table if ".q." in name or ".wi_1." in name or ".wo." in name]
    stored, _, meant = made.scaled_fp8(table, scheme, layers=layers)
    save_file(stored, tmp_path / "fp8.safetensors")
    save_file(meant, tmp_path / "meant.safetensors")
    ours = run(base, text_encoder=tmp_path / "fp8.safetensors")
    assert same(ours, run(base, text_encoder=tmp_path / "meant.safetensors"))
    assert relative(ours, expected["float32"]) < 0.02


@pytest.mark.parametrize(("kind", "most"), [("F16", 1e-4), ("Q8_0", 5e-3)])
def test_text_encoder_gguf(base, expected, tmp_path, kind, most):
    table = {made.llama_cpp_name(name): tensor for name, tensor in made.text_encoder().items()}
    meant = made.gguf_file(tmp_path / "t5.gguf", table, kind, "t5encoder")
    published = {name: meant[made.llama_cpp_name(name)].contiguous() for name in made.text_encoder()}
    save_file(published, tmp_path / "meant.safetensors")
    ours = run(base, text_encoder=tmp_path / "t5.gguf")
    assert same(ours, run(base, text_encoder=tmp_path / "meant.safetensors"))
    assert relative(ours, expected["float32"]) < most


def test_vae_names_round_trip():
    model = made.diffusers_vae().state_dict()
    assert {published_vae_name(name) for name in model} == set(made.vae())
    assert all(vae_name(published_vae_name(name)) == name for name in model)


@pytest.mark.parametrize("form", ["file", "folder", ".pth"])
def test_vae(base, expected, tmp_path, form):
    path = tmp_path / "vae"
    table = made.diffusers_vae().state_dict()
    if form == "folder":
        made.diffusers_vae().save_pretrained(path)
    elif form == "file":
        save_file(table, path)
    else:
        torch.save(table, path)
    assert same(run(base, vae=path), expected["float32"])


# --- bad input -------------------------------------------------------------------------------------------------------
@pytest.fixture
def folder(base, tmp_path):
    return shutil.copytree(base, tmp_path / "weights")


@pytest.fixture(autouse=True)
def _no_reading(request, monkeypatch):
    """Where a line is all that is expected, no weight may be read."""
    if request.function.__name__ in ("test_refused", "test_refused_folder"):

        def read(*args):
            raise AssertionError("a weight was read")

        monkeypatch.setattr("wan22.files.tensor_files.FileTensors.read", read)
        monkeypatch.setattr("wan22.files.tensor_files.Pickle.read", read)


def refused(capsys, words, *expected):
    words = ["--prompt", "x", "--size", "32x32", "--frames", "5", *map(str, words)]
    assert main(["generate", "--dry-run", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.partition(":")[0] for line in err.splitlines()] in (["error"], ["error", "hint"]), err
    for text in expected:
        assert text in err, err


def of_5b(path, experts):
    save_file(made.expert(1, channels=48), path)
    return ["--high-noise"], ["5B model", "48 channels"]


def of_5b_diffusers(path, experts):
    table = made.diffusers_expert(experts[HIGH]).state_dict()
    table["patch_embedding.weight"] = torch.zeros(256, 48, 1, 2, 2)
    save_file(table, path)
    return ["--high-noise"], ["5B model"]


def of_images(path, experts):
    save_file(made.expert(1, channels=36), path)
    return ["--low-noise"], ["image-to-video", "36 input channels"]


def of_images_2_1(path, experts):
    save_file({**made.expert(1, channels=36), "img_emb.proj.0.bias": torch.zeros(8)}, path)
    return ["--low-noise"], ["image-to-video", "Wan2.1"]


def of_images_in_gguf(path, experts):
    made.gguf_file(path, made.expert(1, channels=36), "Q8_0")
    return ["--high-noise"], ["image-to-video"]


def of_2_1_small(path, experts):
    table = experts[HIGH]
    table = {name: torch.empty([1536 if n == 256 else n for n in tensor.shape], dtype=torch.bfloat16)
             for name, tensor in table.items() if "blocks.1" not in name}  # fmt: skip
    save_file(table, path)
    return ["--high-noise"], ["1.3B", "Wan2.1"]


def vae_of_2_2(path, experts):
    table = made.vae()
    table["conv2.weight"] = torch.zeros(48, 48, 1, 1, 1)
    save_file(table, path)
    return ["--vae"], ["5B", "48 latent channels"]


def vae_as_expert(path, experts):
    save_file(made.vae(), path)
    return ["--high-noise"], ["a VAE, where an expert is expected"]


def expert_as_text_encoder(path, experts):
    save_file(experts[HIGH], path)
    return ["--text-encoder"], ["an expert, where a text encoder is expected"]


def t5(path, experts):
    table = made.transformers_text_encoder().state_dict()
    table = {name: t.clone() for name, t in table.items() if "relative" not in name or "block.0" in name}
    save_file(table, path)
    return ["--text-encoder"], ["a T5 encoder", "UMT5"]


def adapter(path, experts):
    save_file({"blocks.0.self_attn.q.lora_A.weight": torch.zeros(4, 256)}, path)
    return ["--high-noise"], ["an adapter", "--lora"]


def unknown_tensors(path, experts):
    save_file({"something.weight": torch.zeros(3)}, path)
    return ["--high-noise"], ["not a Wan transformer", "something.weight"]


def gguf_of_flux(path, experts):
    made.gguf_file(path, {"double_blocks.0.img_attn.proj.weight": torch.zeros(32, 32)}, "Q8_0", "flux")
    return ["--high-noise"], ["'flux'", "'wan'"]


def gguf_text_as_expert(path, experts):
    made.gguf_file(path, {"enc.blk.0.attn_q.weight": torch.zeros(32, 32)}, "Q8_0", "t5encoder")
    return ["--low-noise"], ["'t5encoder'", "'wan'"]


def gguf_truncated(path, experts):
    made.gguf_file(path, experts[HIGH], "Q8_0")
    os.truncate(path, path.stat().st_size - 5000)
    return ["--high-noise"], ["truncated"]


def gguf_cut_in_its_header(path, experts):
    made.gguf_file(path, experts[HIGH], "Q8_0")
    os.truncate(path, 500)
    return ["--high-noise"], ["GGUF header"]


def gguf_of_absurd_counts(path, experts):
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1 << 60) + bytes(100))
    return ["--high-noise"], ["GGUF header"]


def gguf_of_an_absurd_array(path, experts):
    key = struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 0, 1 << 60)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key + bytes(100))
    return ["--high-noise"], ["GGUF header"]


def safetensors_of_an_absurd_header(path, experts):
    path.write_bytes(struct.pack("<Q", 1 << 50) + b"{}" + bytes(100))
    return ["--high-noise"], ["its header claims"]


def lfs_pointer(path, experts):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9992481544\n")
    return ["--vae"], ["Git LFS pointer"]


def pickle_with_code(path, experts):
    torch.save({"encoder.conv1.weight": Evil()}, path)
    return ["--vae"], ["code"]


class Evil:
    def __reduce__(self):
        return print, ("code ran",)


def fp8_without_a_scale(path, experts):
    stored, _, _ = made.scaled_fp8(experts[HIGH], "old")
    del stored["blocks.1.ffn.2.scale_weight"]
    save_file(stored, path)
    return ["--high-noise"], ["lacks the scale of blocks.1.ffn.2.weight"]


def fp8_without_its_new_scale(path, experts):
    stored, _, _ = made.scaled_fp8(experts[HIGH], "new")
    del stored["blocks.1.ffn.2.weight_scale"]
    save_file(stored, path)
    return ["--high-noise"], ["lacks the scale of blocks.1.ffn.2.weight"]


def fp8_scales_without_a_weight(path, experts):
    stored, _, _ = made.scaled_fp8(experts[HIGH], "new")
    del stored["blocks.1.ffn.2.weight"]
    save_file(stored, path)
    return ["--high-noise"], ["blocks.1.ffn.2.weight", "not there"]


def fp8_in_blocks(path, experts):
    stored, _, _ = made.scaled_fp8(experts[HIGH], "new")
    stored["blocks.1.ffn.2.weight_scale"] = torch.ones(2, 4)
    save_file(stored, path)
    return ["--high-noise"], ["blocks.1.ffn.2.weight_scale [2, 4]"]


def nvfp4(path, experts):
    stored, _, _ = made.scaled_fp8(experts[HIGH], "new")
    told = bytearray(json.dumps({"format": "nvfp4"}).encode())
    stored["blocks.0.ffn.0.comfy_quant"] = torch.frombuffer(told, dtype=torch.uint8)
    save_file(stored, path)
    return ["--high-noise"], ["'nvfp4'"]


def whole_numbers(path, experts):
    table = {name: tensor.to(torch.int8) if name.endswith("ffn.0.weight") else tensor
             for name, tensor in experts[HIGH].items()}  # fmt: skip
    save_file(table, path)
    return ["--high-noise"], ["blocks.0.ffn.0.weight is of whole numbers (I8)"]


def low_by_its_metadata(path, experts):
    made.gguf_file(path, experts[HIGH], "F16", general__name="Wan2.2 T2V A14B LowNoise")
    return ["--high-noise"], ["the low-noise expert", "general.name", "swapped"]


BAD_PARTS = [
    of_5b, of_5b_diffusers, of_images, of_images_2_1, of_images_in_gguf, of_2_1_small, vae_of_2_2, vae_as_expert,
    expert_as_text_encoder, t5, adapter, unknown_tensors, gguf_of_flux, gguf_text_as_expert, gguf_truncated,
    gguf_cut_in_its_header, gguf_of_absurd_counts, gguf_of_an_absurd_array, safetensors_of_an_absurd_header,
    lfs_pointer, pickle_with_code, fp8_without_a_scale, fp8_without_its_new_scale, fp8_scales_without_a_weight,
    fp8_in_blocks, nvfp4, whole_numbers, low_by_its_metadata,
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD_PARTS, ids=lambda bad: bad.__name__)
def test_refused(capsys, base, experts, tmp_path, bad):
    path = tmp_path / "part"
    flags, expected = bad(path, experts)
    refused(capsys, ["--ckpt_dir", base, flags[0], path], str(path), *expected)


def one_file_twice(folder):
    return ["--high-noise", folder / HIGH, "--low-noise", folder / HIGH], ["high-noise expert by its folder", "swapped"]


def one_content_twice(folder):
    table = {}
    for shard in (folder / HIGH).glob("*.safetensors"):
        table |= load_file(shard)
    for name in ("a", "b"):
        prefix = "model.diffusion_model." if name == "a" else ""
        save_file({prefix + key: tensor for key, tensor in table.items()}, folder / f"{name}.safetensors")
    return ["--high-noise", folder / "a.safetensors", "--low-noise", folder / "b.safetensors"], ["same file content"]


def two_high_noise_experts(folder):
    shutil.rmtree(folder / LOW)
    shutil.copytree(folder / HIGH, folder / LOW)
    return [], ["high_noise_model", "low_noise_model", "same file content"]


def swapped_flags(folder):
    return ["--high-noise", folder / LOW, "--low-noise", folder / HIGH], ["low-noise expert by its folder", "swapped"]


def several_missing(folder):
    (folder / HIGH / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    (folder / LOW / "config.json").unlink()
    (folder / "Wan2.1_VAE.pth").unlink()
    (folder / "google/umt5-xxl/tokenizer.json").unlink()
    return [], ["no such files", "high_noise_model/diffusion_pytorch_model-00002-of-00003.safetensors",
                "low_noise_model/config.json", "Wan2.1_VAE.pth", "google/umt5-xxl/tokenizer.json"]  # fmt: skip


def missing_index(folder):
    (folder / HIGH / made.INDEX).unlink()
    return [], [f"{HIGH}/{made.INDEX}", "no such file"]


def loose_files(folder):
    for path in list(folder.iterdir()):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    save_file({"x": torch.zeros(1)}, folder / "wan2.2_t2v_high_noise_14B_fp16.safetensors")
    return [], ["not a checkpoint", "wan2.2_t2v_high_noise_14B_fp16.safetensors", "--high-noise FILE --low-noise FILE"]


def wan_2_1(folder):
    for name in (HIGH, LOW):
        shutil.rmtree(folder / name)
    (folder / "config.json").write_text(json.dumps(made.CONFIG))
    return [], ["one transformer", "Wan2.1"]


def wan_2_2_5b(folder):
    for name in (HIGH, LOW):
        shutil.rmtree(folder / name)
    config = {**made.CONFIG, "in_dim": 48, "model_type": "ti2v", "dim": 3072, "num_heads": 24}
    (folder / "config.json").write_text(json.dumps(config))
    return [], ["the 5B model", "3072"]


def missing_part(folder):
    return ["--vae", folder / "nowhere.safetensors"], ["nowhere.safetensors", "no such file"]


def several_files(folder):
    for name in ("a", "b"):
        save_file(made.vae(), folder / "google" / f"{name}.safetensors")
    return ["--vae", folder / "google"], ["2 files of weights", "a.safetensors"]


def no_weights(folder):
    return ["--vae", folder / "google" / "umt5-xxl"], ["no weights"]


BAD_FOLDERS = [
    one_file_twice, one_content_twice, two_high_noise_experts, swapped_flags, several_missing, missing_index,
    loose_files, wan_2_1, wan_2_2_5b, missing_part, several_files, no_weights,
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD_FOLDERS, ids=lambda bad: bad.__name__)
def test_refused_folder(capsys, folder, bad):
    flags, expected = bad(folder)
    refused(capsys, ["--ckpt_dir", folder, *flags], *expected)


def diffusers_swapped(folder):
    return ["--high-noise", folder / "transformer_2"], ["low-noise expert", "Diffusers"]


def diffusers_of_swapped_origin(folder):
    for name in ("transformer", "transformer_2"):
        path = folder / name / "config.json"
        config = {**json.loads(path.read_text()), "_name_or_path": "/x/Wan2.2-T2V-A14B-Diffusers/transformer_2"}
        path.write_text(json.dumps(config))
    return [], ["low-noise expert by its config"]


def diffusers_of_one_transformer(folder):
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"transformer_2": [None, None], "boundary_ratio": None}
    (folder / "model_index.json").write_text(json.dumps(index))
    shutil.rmtree(folder / "transformer_2")
    return [], ["one transformer", "Wan2.1"]


def diffusers_without_its_second(folder):
    shutil.rmtree(folder / "transformer_2")
    return [], ["transformer_2", "no such file"]


def diffusers_of_images(folder):
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "in_channels": 36}))
    return [], ["transformer/config.json", "image-to-video"]


def diffusers_of_odd_boundary(folder):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "boundary_ratio": 875}))
    return [], ["boundary_ratio is 875"]


def diffusers_index_leads_outside(folder):
    path = folder / "transformer_2" / made.INDEX
    index = json.loads(path.read_text())
    index["weight_map"]["proj_out.bias"] = "../../secret.safetensors"
    path.write_text(json.dumps(index))
    return [], [str(path), "outside"]


BAD_DIFFUSERS = [
    diffusers_swapped, diffusers_of_swapped_origin, diffusers_of_one_transformer, diffusers_without_its_second,
    diffusers_of_images, diffusers_of_odd_boundary, diffusers_index_leads_outside,
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD_DIFFUSERS, ids=lambda bad: bad.__name__)
def test_refused_diffusers(capsys, diffusers, tmp_path, bad):
    folder = shutil.copytree(diffusers, tmp_path / "weights")
    flags, expected = bad(folder)
    refused(capsys, ["--ckpt_dir", folder, *flags], *expected)


def test_linked_experts_are_usable(base, tmp_path):
    """As scripts/random_checkpoint.py --link makes them, to save the disk: a warning, and only within a folder."""
    folder = shutil.copytree(base, tmp_path / "weights")
    shutil.rmtree(folder / LOW)
    shutil.copytree(folder / HIGH, folder / LOW, copy_function=os.link)
    (warning,) = open_checkpoint(folder).warnings
    assert "same file content" in warning
    with pytest.raises(RequestError, match="same file content"):
        open_checkpoint(folder, parts=Parts(low_noise=str(folder / LOW)))


def test_a_file_name_only_warns(base, experts, tmp_path):
    path = tmp_path / "wan2.2_t2v_low_noise_14B_fp16.safetensors"
    save_file(experts[HIGH], path)
    (warning,) = open_checkpoint(base, parts=Parts(high_noise=str(path))).warnings
    assert "its name says low noise" in warning


def test_the_golden_checkpoint_is_as_published():
    checkpoint = open_checkpoint(TINY)
    assert {layout_of(expert.tensors) for expert in checkpoint.experts.values()} == {"published"}
    assert checkpoint.warnings == []


def test_parts_have_the_shapes_that_the_libraries_give_them():
    """What is checked without building a model is what the models are."""
    from diffusers import AutoencoderKLWan
    from transformers import UMT5Config, UMT5EncoderModel

    from wan22.files.part_shapes import text_encoder_shapes, text_encoder_sizes, vae_shapes
    from wan22.files.tensor_names import published_vae_name, text_encoder_name

    with torch.device("meta"):
        vae = AutoencoderKLWan(base_dim=24, z_dim=8).state_dict()
        text = UMT5EncoderModel(UMT5Config(vocab_size=30, d_model=16, d_kv=4, num_heads=3, d_ff=20, num_layers=2,
                                           relative_attention_num_buckets=5)).state_dict()  # fmt: skip
    assert vae_shapes(24, 8) == {published_vae_name(name): tuple(tensor.shape) for name, tensor in vae.items()}
    sizes = {"vocab": 30, "width": 16, "ffn": 20, "heads": 3, "layers": 2, "inner": 12, "buckets": 5}
    shapes = text_encoder_shapes(**sizes)
    text.pop("encoder.embed_tokens.weight")
    assert {text_encoder_name(name): shape for name, shape in shapes.items()} == {
        name: tuple(tensor.shape) for name, tensor in text.items()}  # fmt: skip
    assert text_encoder_sizes(shapes) == sizes
