"""What users get wrong: one clear line that names the file or flag, exit 2, nothing loaded, nothing written."""

import json
import pickle
import struct

import pytest
import torch
from conftest import TINY

from wan22 import load
from wan22.cli import main
from wan22.config import WEIGHTS

SMALL = ["--size", "64x64", "--frames", "5", "--steps", "1", "--prompt", "a red ball"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """An empty working folder, and no way to read a weight."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "no-cache"))
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    def read(*args):
        raise AssertionError("a weight was read")

    monkeypatch.setattr("wan22.files.tensor_files.Safetensors.read", read)
    monkeypatch.setattr("wan22.files.tensor_files.Pickle.read", read)
    return folder


def refused(capsys, words, *expected, code=2):
    """Runs a command that must fail; the one error line holds all that is expected."""
    assert main(["generate", *map(str, words)]) == code
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert [line.partition(":")[0] for line in lines] in (["error"], ["error", "hint"]), err
    for text in expected:
        assert text in err, err


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--prompt", "a \udcff"], ["--prompt", "character 3", "UTF-8"]),
        (["--negative-prompt", "\ud800"], ["--negative-prompt"]),
        (["--lora", "\udcff.safetensors"], ["--lora"]),
        (["--frames", "80"], ["--frames", "80", "77 and 81"]),
        (["--frames", "0"], ["--frames"]),
        (["--frames", "-3"], ["--frames"]),
        (["--frames", "many"], ["--frames"]),
        (["--size", "1282x720"], ["width 1282", "1280 and 1296"]),
        (["--size", "1280*721"], ["height 721", "720 and 736"]),
        (["--size", "big"], ["--size big"]),
        (["--size", "0x0"], ["width"]),
        (["--size", "99999x64"], ["width"]),
        (["--prompt", ""], ["--prompt", "empty"]),
        (["--prompt", " \n "], ["--prompt", "empty"]),
        (["--steps", "-1"], ["--steps", "-1"]),
        (["--steps", "0"], ["--steps"]),
        (["--steps", "100000"], ["--steps", "1000"]),
        (["--solver", "magic"], ["--solver magic", "unipc"]),
        (["--task", "i2v-A14B"], ["--task i2v-A14B", "t2v-A14B"]),
        (["--shift", "nan"], ["--shift"]),
        (["--shift", "-5"], ["--shift"]),
        (["--guidance", "inf"], ["--guidance"]),
        (["--seed", "-2"], ["--seed"]),
        (["--fps", "0"], ["--fps"]),
        (["--offload_model", "maybe"], ["--offload_model maybe"]),
        (["--offload_model", "True", "--offload", "none"], ["contradict"]),
        (["--offload", "sometimes"], ["--offload sometimes"]),
        (["--dtype", "fp3"], ["--dtype fp3"]),
        (["--device", "tpu"], ["--device tpu"]),
        (["--noise-device", "gpu"], ["--noise-device"]),
        (["--dit_fsdp"], ["--dit_fsdp", "torchrun"]),
        (["--t5_fsdp"], ["--t5_fsdp", "torchrun"]),
        (["--ulysses_size", "4"], ["--ulysses_size", "torchrun"]),
        (["--preset", "nonsense"], ["--preset nonsense", "demo"]),
        (["--preset", "lightning"], ["Wan2.2-T2V-A14B-4steps-lora", "loras", "wan22 download lightning"]),
        (["--no-such-flag"], ["--no-such-flag"]),
        (["--from", "nowhere.mp4"], ["nowhere.mp4"]),
        (["--ckpt_dir", "nowhere"], ["--ckpt_dir", "nowhere", "wan22 download"]),
        (["--model", "nowhere/there"], ["nowhere/there"]),
        (["--model", "demo", "--ckpt_dir", "nowhere"], ["--model and --ckpt_dir both"]),
        (["--output", "video.docx"], ["video.docx"]),
        (["--output", ""], ["--output", "empty"]),
        (["--preset", ""], ["--preset", "empty"]),
        (["--output", "/proc/nowhere/video.mp4"], ["/proc/nowhere"]),
    ],
)
def test_flags(capsys, elsewhere, flags, expected):
    refused(capsys, [*SMALL, "--ckpt_dir", TINY, *flags] if "--ckpt_dir" not in flags and "--model" not in flags
            else [*SMALL, *flags], *expected)  # fmt: skip
    assert list(elsewhere.iterdir()) == []


def test_no_prompt(capsys):
    refused(capsys, ["--ckpt_dir", TINY], "--prompt is missing")


def test_no_weights_names_every_place(capsys):
    places = ["$WAN22_CKPT_DIR", "./Wan2.2-T2V-A14B", "./T2V_A14B_weights", "Hugging Face"]
    refused(capsys, SMALL, *places, "wan22 download")


def test_existing_output(capsys, elsewhere):
    (elsewhere / "there.mp4").write_bytes(b"precious")
    refused(capsys, [*SMALL, "--ckpt_dir", TINY, "--output", "there.mp4"], "there.mp4", "--overwrite")
    assert (elsewhere / "there.mp4").read_bytes() == b"precious"


def first_shard(weights):
    return weights / "high_noise_model" / "diffusion_pytorch_model-00001-of-00003.safetensors"


def index_of(weights):
    return weights / "high_noise_model" / "diffusion_pytorch_model.safetensors.index.json"


def edit_index(weights, change):
    index = json.loads(index_of(weights).read_text())
    change(index["weight_map"])
    index_of(weights).write_text(json.dumps(index))


def missing_shard(weights):
    first_shard(weights).unlink()
    return [first_shard(weights).name, "no such file"]


def truncated_shard(weights):
    data = first_shard(weights).read_bytes()
    first_shard(weights).write_bytes(data[:-1000])
    return [first_shard(weights).name, "truncated"]


def truncated_header(weights):
    first_shard(weights).write_bytes(first_shard(weights).read_bytes()[:100])
    return [first_shard(weights).name, "truncated"]


def empty_shard(weights):
    first_shard(weights).write_bytes(b"")
    return [first_shard(weights).name]


def absurd_header(weights):
    first_shard(weights).write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    return [first_shard(weights).name, "safetensors"]


def foreign_header(weights):
    first_shard(weights).write_bytes(struct.pack("<Q", 8) + b"not json")
    return [first_shard(weights).name, "header"]


def lying_header(weights):
    raw = b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}'
    first_shard(weights).write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(4))
    return [first_shard(weights).name, "header", "x"]


def lfs_pointer(weights):
    first_shard(weights).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9992481544\n")
    return [first_shard(weights).name, "Git LFS pointer", "git lfs pull"]


def lfs_pointer_pth(weights):
    (weights / "Wan2.1_VAE.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    return ["Wan2.1_VAE.pth", "Git LFS pointer"]


def index_names_too_much(weights):
    edit_index(weights, lambda names: names.update({"blocks.9.ghost": first_shard(weights).name}))
    return ["index.json", "blocks.9.ghost"]


def index_leaves_out(weights):
    edit_index(weights, lambda names: names.pop("blocks.0.cross_attn.k.bias"))
    return ["blocks.0.cross_attn.k.bias"]


def index_points_outside(weights):
    edit_index(weights, lambda names: names.update({"blocks.0.cross_attn.k.bias": "../../../etc/passwd"}))
    return ["index.json", "outside"]


def index_is_no_index(weights):
    index_of(weights).write_text("[1, 2")
    return ["index.json"]


def missing_index(weights):
    index_of(weights).unlink()
    return ["index.json", "no such file"]


def missing_config(weights):
    (weights / "low_noise_model" / "config.json").unlink()
    return ["low_noise_model/config.json"]


def config_without_sizes(weights):
    (weights / "low_noise_model" / "config.json").write_text("{}")
    return ["low_noise_model/config.json", "dim"]


def wrong_shape(weights):
    for name in ("high_noise_model", "low_noise_model"):
        path = weights / name / "config.json"
        path.write_text(path.read_text().replace('"ffn_dim": 256', '"ffn_dim": 512'))
    return ["high_noise_model", "blocks.0.ffn.0.weight", "[256, 128]", "[512, 128]"]


def two_sizes(weights):
    path = weights / "low_noise_model" / "config.json"
    path.write_text(path.read_text().replace('"num_layers": 3', '"num_layers": 2'))
    return ["experts differ", "num_layers"]


def other_model(weights):
    path = weights / "high_noise_model" / "config.json"
    path.write_text(path.read_text().replace('"t2v"', '"i2v"'))
    return ["high_noise_model/config.json", "i2v"]


class Evil:
    def __reduce__(self):
        return print, ("code ran",)


def pickle_with_code(weights):
    torch.save({"token_embedding.weight": Evil()}, weights / "models_t5_umt5-xxl-enc-bf16.pth")
    return ["models_t5_umt5-xxl-enc-bf16.pth", "code"]


def old_pickle_with_code(weights):
    (weights / "Wan2.1_VAE.pth").write_bytes(pickle.dumps({"conv1.weight": Evil()}))
    return ["Wan2.1_VAE.pth"]


def truncated_pickle(weights):
    path = weights / "Wan2.1_VAE.pth"
    path.write_bytes(path.read_bytes()[:-5000])
    return ["Wan2.1_VAE.pth", "truncated"]


def pickle_of_another_model(weights):
    torch.save({"layer.weight": torch.zeros(3)}, weights / "models_t5_umt5-xxl-enc-bf16.pth")
    return ["models_t5_umt5-xxl-enc-bf16.pth", "layer.weight"]


def pickle_of_no_tensors(weights):
    torch.save([1, 2], weights / "Wan2.1_VAE.pth")
    return ["Wan2.1_VAE.pth", "table of tensors"]


def missing_text_encoder(weights):
    (weights / "models_t5_umt5-xxl-enc-bf16.pth").unlink()
    return ["models_t5_umt5-xxl-enc-bf16.pth", "no such file"]


def missing_tokenizer(weights):
    (weights / "google" / "umt5-xxl" / "tokenizer.json").unlink()
    return ["tokenizer.json", "no such file"]


def missing_expert(weights):
    (weights / "low_noise_model").rename(weights / "elsewhere")
    return ["low_noise_model"]


def no_checkpoint(weights):
    for path in list(weights.iterdir()):
        path.rename(weights.parent / f"gone-{path.name}")
    return ["weights", "not a checkpoint"]


BREAKAGES = [
    missing_shard, truncated_shard, truncated_header, empty_shard, absurd_header, foreign_header, lying_header,
    lfs_pointer, lfs_pointer_pth, index_names_too_much, index_leaves_out, index_points_outside, index_is_no_index,
    missing_index, missing_config, config_without_sizes, wrong_shape, two_sizes, other_model, pickle_with_code,
    old_pickle_with_code, truncated_pickle, pickle_of_another_model, pickle_of_no_tensors, missing_text_encoder,
    missing_tokenizer, missing_expert, no_checkpoint,
]  # fmt: skip


@pytest.mark.parametrize("breakage", BREAKAGES, ids=lambda breakage: breakage.__name__)
def test_broken_checkpoint(capsys, elsewhere, tiny_copy, breakage):
    expected = breakage(tiny_copy)
    refused(capsys, [*SMALL, "--ckpt_dir", tiny_copy], *expected)
    assert list(elsewhere.iterdir()) == []


def test_preset_with_unknown_key(capsys, elsewhere):
    (elsewhere / "mine.toml").write_text("[request]\nnum_step = 4\n")
    refused(capsys, [*SMALL, "--ckpt_dir", TINY, "--preset", "mine.toml"], "mine.toml", "num_step", "num_steps")


@pytest.mark.parametrize("placement", ["device = 5", "lora_dir = 5", 'prompt_cache = "no"', 'dit_fsdp = "x"',
                                       "offload = []", "text_encoder = 5", 'gpus = "2"'])  # fmt: skip
def test_preset_with_values_of_another_type(capsys, elsewhere, placement):
    (elsewhere / "mine.toml").write_text(f"[placement]\n{placement}\n")
    name = placement.partition(" ")[0].replace("lora_dir", "lora-dir")
    refused(capsys, [*SMALL, "--ckpt_dir", TINY, "--preset", "mine.toml"], "mine.toml", name)


@pytest.mark.parametrize("target", ["n" * 250, "/proc/converted"])
def test_convert_to_where_nothing_can_be(capsys, elsewhere, target):
    assert main(["convert", str(TINY), target]) == 2
    assert capsys.readouterr().err.startswith("error: cannot write ")
    assert list(elsewhere.iterdir()) == []


def test_every_weight_dtype_is_known():
    assert {"auto", *load.DTYPES} == set(WEIGHTS)


@pytest.mark.parametrize(("words", "said"), [
    (["gallery", ""], "FOLDER"), (["convert", "", "out"], "SOURCE"), (["convert", "in", ""], "TARGET"),
    (["plan", "--gpu-memory", ""], "--gpu-memory"), (["plan", "--rates", ""], "--rates"),
    (["bench", "--size", ""], "--size"), (["compare", "", "b"], "A"), (["download", "--only", ""], "--only"),
    (["batch", ""], "FILE"), (["batch", "a.txt", "--seeds", ""], "--seeds"), (["show", ""], "FILE"),
    (["decode", "a.latents.safetensors", "--output", ""], "--output"), (["status", ""], "FOLDER"),
    (["sheet", ""], "FILES"),
])  # fmt: skip
def test_an_empty_word_means_nothing(words, said, capsys, elsewhere):
    """As that of a shell's variable which is not set."""
    assert main(words) == 2
    assert capsys.readouterr().err == f"error: {said}: its value is empty\n"
    assert list(elsewhere.iterdir()) == []
