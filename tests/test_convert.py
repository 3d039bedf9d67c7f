"""`wan22 convert`: any layout to one folder, bit for bit what a run needs; whole or not there; `wan22 show`."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import checkpoints as made
import pytest
import torch
from conftest import ROOT, TINY
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_layouts import HIGH, LOW, relative, run, same

from wan22 import convert as module
from wan22.checkpoint import Parts, open_checkpoint
from wan22.cli import main
from wan22.config import DoesNotFit, RequestError
from wan22.convert import convert
from wan22.files.contents import describe


@pytest.fixture(scope="module")
def experts():
    return {name: made.expert(seed) for seed, name in enumerate(made.EXPERTS)}


@pytest.fixture(scope="module")
def base(experts, tmp_path_factory):
    return made.published(tmp_path_factory.mktemp("base") / "weights", experts)


@pytest.fixture(scope="module")
def expected(base):
    return {dtype: run(base, dtype) for dtype in ("float32", "bf16")}


def digests(folder):
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in folder.rglob("*") if path.is_file()}  # fmt: skip


def converted(source, target, dtype="bf16", **parts):
    parts = Parts(**{role: str(path) for role, path in parts.items()})
    return convert(open_checkpoint(source, parts=parts), target, dtype, progress=False)


# --- what is in it ---------------------------------------------------------------------------------------------------
def test_bf16_is_bit_identical(base, expected, tmp_path):
    """The exact recipe (bf16 products, the rest float32) cannot tell the folders apart."""
    folder = converted(base, tmp_path / "bf16")
    assert same(run(folder, "bf16"), expected["bf16"])
    size, whole = (sum(path.stat().st_size for path in (f / HIGH).glob("*.safetensors")) for f in (folder, base))
    assert size < 0.75 * whole
    assert not list(folder.rglob("*.pth"))
    for shard in folder.rglob("*.safetensors"):
        load_file(shard)  # by the library


@pytest.mark.parametrize("layout", ["diffusers", "single", "converted"])
def test_the_layout_does_not_matter(base, experts, tmp_path, layout):
    """The same numbers from another layout make the same bytes, a converted folder among them."""
    expected = digests(converted(base, tmp_path / "expected"))
    if layout == "diffusers":
        source = made.diffusers(tmp_path / "source", experts)
        ours = digests(converted(source, tmp_path / "ours", tokenizer=base / "google/umt5-xxl"))
        for name in made.EXPERTS:  # its config tells fewer keys
            expected.pop(f"{name}/config.json"), ours.pop(f"{name}/config.json")
        expected.pop("configuration.json")
    elif layout == "single":
        parts = {}
        for role, name in (("high_noise", HIGH), ("low_noise", LOW)):
            parts[role] = tmp_path / f"{name}.safetensors"
            save_file({f"model.diffusion_model.{key}": t for key, t in experts[name].items()}, parts[role])
        ours = digests(converted(base, tmp_path / "ours", **parts))
        for name in made.EXPERTS:
            expected.pop(f"{name}/config.json"), ours.pop(f"{name}/config.json")
    else:
        ours = digests(converted(tmp_path / "expected", tmp_path / "ours"))
    assert ours == expected


def test_fp8(base, experts, expected, tmp_path):
    folder = converted(base, tmp_path / "fp8", "fp8")
    assert relative(run(folder, "bf16"), expected["bf16"]) < 0.03
    shard = next((folder / HIGH).glob("*.safetensors"))
    with safe_open(shard, "pt") as file:
        weight, scale = (file.get_tensor(f"blocks.0.ffn.2.{kind}") for kind in ("weight", "weight_scale"))
        told = json.loads(file.metadata()["_quantization_metadata"])["layers"]
        assert file.get_tensor("head.head.weight").dtype == torch.float32
        assert file.get_tensor("text_embedding.0.weight").dtype == torch.bfloat16
    original = experts[HIGH]["blocks.0.ffn.2.weight"]
    assert (weight.dtype, scale.dtype, scale.shape) == (torch.float8_e4m3fn, torch.float32, (len(weight), 1))
    assert set(told) == set(made.LINEARS)
    # Naive broadcasting, as other readers do it, gives the weights back: to half a step of three bits, and exactly
    # where a row is largest.
    error = (weight.float() * scale - original).abs()
    assert (error <= original.abs() / 16 + scale / 512).all()
    assert error.gather(1, original.abs().argmax(1, keepdim=True)).max() < 1e-6


@pytest.mark.parametrize(("scheme", "rows"), [("old", False), ("new", True)])
def test_fp8_of_fp8_keeps_its_bits(base, experts, tmp_path, scheme, rows):
    """Rounding twice would cost twice: what is e4m3 already is kept, its scale spread over the rows."""
    stored, metadata, meant = made.scaled_fp8(experts[HIGH], scheme, rows=rows)
    save_file(stored, tmp_path / "fp8.safetensors", metadata=metadata)
    folder = converted(base, tmp_path / "ours", "fp8", high_noise=tmp_path / "fp8.safetensors")
    table = {}
    for shard in (folder / HIGH).glob("*.safetensors"):
        table |= load_file(shard)
    for layer in made.LINEARS:
        ours = table[f"{layer}.weight"].float() * table[f"{layer}.weight_scale"]
        assert torch.equal(ours, meant[f"{layer}.weight"]), layer
    assert same(run(folder, "bf16"), run(base, "bf16", high_noise=tmp_path / "fp8.safetensors", low_noise=folder / LOW,
                                         text_encoder=folder))  # fmt: skip


@pytest.mark.parametrize("source", ["gguf", "fp8"])
def test_quantized_sources(base, experts, tmp_path, source):
    """A run in bf16 from what was made of a quantized file is the run from that file."""
    path = tmp_path / "high"
    if source == "gguf":
        made.gguf_file(path, experts[HIGH], "Q8_0")
    else:
        save_file(made.scaled_fp8(experts[HIGH], "old", torch.float8_e5m2)[0], path)
    folder = converted(base, tmp_path / "bf16", high_noise=path)
    assert same(run(folder, "bf16"), run(base, "bf16", high_noise=path))


# --- whole, or not there ---------------------------------------------------------------------------------------------
@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(module, "MAX_SHARD", 600_000)


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_twice_is_the_same_bytes(base, tmp_path, small_shards, dtype):
    first, second = (converted(base, tmp_path / name, dtype) for name in ("first", "second"))
    assert digests(first) == digests(second)
    assert len(list((first / HIGH).glob("*.safetensors"))) > 2
    for path in first.rglob("*.safetensors"):
        assert path.stat().st_size < 700_000 or len(load_file(path)) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]
    assert same(run(first), run(second))


KILLED = """
import os, signal, sys
sys.path[:0] = ["tests"]
from pathlib import Path
from wan22 import convert
from wan22.checkpoint import open_checkpoint
convert.MAX_SHARD = 600_000
write, count = convert.write_shard, [0]
class Bar:
    def update(self, size):
        if count[0] == 3:
            os.kill(os.getpid(), signal.SIGKILL)
def until_killed(shard, path, bar):
    count[0] += 1
    write(shard, path, Bar())
convert.write_shard = until_killed
convert.convert(open_checkpoint(Path(sys.argv[1])), Path(sys.argv[2]), "bf16", progress=False)
"""


def test_goes_on_after_a_kill(base, tmp_path, small_shards, monkeypatch):
    expected = digests(converted(base, tmp_path / "straight"))
    target, staged = tmp_path / "killed", tmp_path / ".killed.partial"
    died = subprocess.run([sys.executable, "-c", KILLED, base, target], cwd=ROOT, check=False)
    assert died.returncode == -signal.SIGKILL
    assert not target.exists()
    kept = {path: path.stat().st_mtime_ns for path in staged.rglob("*.safetensors")}
    assert len(kept) == 2
    assert len(list(staged.rglob("*.half"))) == 1
    written = []
    write = module.write_shard
    monkeypatch.setattr(module, "write_shard", lambda shard, path, bar: (written.append(path), write(shard, path, bar)))
    converted(base, target)
    assert not kept.keys() & set(written)
    assert {path.stat().st_mtime_ns for path in target.rglob("*.safetensors")} >= set(kept.values())
    assert digests(target) == expected
    assert not staged.exists()


def test_another_source_or_dtype_starts_over(base, tmp_path, small_shards, monkeypatch):
    def stop(shard, path, bar):
        if "low" in str(path):
            raise KeyboardInterrupt
        write(shard, path, bar)

    write = module.write_shard
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_shard", stop)
        with pytest.raises(KeyboardInterrupt):
            converted(base, tmp_path / "weights", "fp8")
    assert list((tmp_path / ".weights.partial" / HIGH).glob("*.safetensors"))
    assert digests(converted(base, tmp_path / "weights")) == digests(converted(base, tmp_path / "straight"))


def test_one_at_a_time(base, tmp_path, monkeypatch):
    def again(*args):
        monkeypatch.undo()
        with pytest.raises(RequestError, match="is being written by another"):
            converted(base, tmp_path / "weights")
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_shard", again)
    with pytest.raises(KeyboardInterrupt):
        converted(base, tmp_path / "weights")


def test_a_full_disk_is_told_first(base, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 40, 1 << 40, 1_234_567))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DoesNotFit, match=r"needs [\d,]+ bytes of disk, 1,234,567 are free"):
        converted(base, tmp_path / "weights")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_folder_that_is_read_only(base, tmp_path, monkeypatch, number):
    def refuse(self, *args, **options):
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(RequestError, match="cannot be written"):
        converted(base, tmp_path / "weights")


def test_a_path_that_leads_back(base):
    """Through a folder that does not exist, into one that does."""
    before = digests(base)
    with pytest.raises(RequestError, match="exists already"):
        converted(base, base / "nowhere" / ".." / HIGH)
    assert digests(base) == before
    assert not (base / "nowhere").exists()


def test_a_disk_that_fills(base, tmp_path, small_shards, monkeypatch):
    def full(shard, path, bar):
        if len(written) == 3:
            raise OSError(28, "No space left on device", str(path))
        written.append(path)
        write(shard, path, bar)

    written, write = [], module.write_shard
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_shard", full)
        with pytest.raises(DoesNotFit, match="No space left") as told:
            converted(base, tmp_path / "weights")
    assert "goes on" in told.value.hint
    assert digests(converted(base, tmp_path / "weights")) == digests(converted(base, tmp_path / "straight"))


@pytest.mark.parametrize("what", ["file", "folder", "staged"])
def test_nothing_is_overwritten(capsys, base, tmp_path, what):
    target = tmp_path / "weights"
    there = tmp_path / ".weights.partial" if what == "staged" else target
    if what == "file":
        there.write_text("precious")
    else:
        there.mkdir()
        (there / "thing").write_text("precious")
    assert main(["convert", str(base), str(target)]) == 2
    assert str(there) in capsys.readouterr().err
    assert (there if what == "file" else there / "thing").read_text() == "precious"


def test_one_expert_twice(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "weights")
    shutil.rmtree(folder / LOW)
    shutil.copytree(folder / HIGH, folder / LOW, copy_function=os.link)
    with pytest.raises(RequestError, match="the same one"):
        converted(folder, tmp_path / "converted")


def test_command(capsys, base, tmp_path):
    assert main(["convert", str(base), str(tmp_path / "weights"), "--dtype", "fp8", "--vae", str(TINY)]) == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'weights'}\n"
    assert "convert" in err
    assert main(["convert", str(base), str(tmp_path / "other"), "--dtype", "int3"]) == 2
    assert "--dtype int3" in capsys.readouterr().err


def test_a_scale_that_gets_lost_is_told(base, tmp_path, small_shards):
    """Each shard says in its own metadata what is scaled; all of them count."""
    folder = converted(base, tmp_path / "fp8", "fp8")
    for shard in sorted((folder / LOW).glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            table, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
        if lost := next((key for key in table if key.endswith("weight_scale")), None):
            break
    del table[lost]
    save_file(table, shard, metadata=metadata)
    index = json.loads((folder / LOW / made.INDEX).read_text())
    del index["weight_map"][lost]
    (folder / LOW / made.INDEX).write_text(json.dumps(index))
    with pytest.raises(RequestError, match=f"lacks the scale of {lost.removesuffix('_scale')}"):
        open_checkpoint(folder)


# --- show ------------------------------------------------------------------------------------------------------------
def test_show(capsys, base, experts, tmp_path):
    folder = converted(base, tmp_path / "fp8", "fp8")
    (folder / "google/umt5-xxl/tokenizer.json").unlink()
    assert main(["show", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "published, scaled fp8; F8_E4M3" in out
    assert "google/umt5-xxl/tokenizer.json" in out
    assert "not whole" in out
    assert max(map(len, out.splitlines()[1:])) <= 80
    assert main(["show", "--json", str(base)]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["identity"] == open_checkpoint(base).identity()
    assert facts["parts"][HIGH]["parameters"] == sum(tensor.numel() for tensor in experts[HIGH].values())
    assert (facts["missing"], facts["broken"]) == ([], [])


def test_show_parts(base, experts, tmp_path):
    made.gguf_file(tmp_path / "a.gguf", experts[LOW], "Q8_0", general__name="Wan2.2 low noise")
    facts = describe(tmp_path / "a.gguf")
    assert (facts["is"], facts["noise"], facts["layout"]) == ("an expert", "low", "GGUF")
    assert facts["dtypes"].keys() == {"Q8_0", "F32"}
    assert (facts["sizes"]["num_heads"], facts["sizes"]["num_layers"]) == (2, 2)
    assert describe(base / "Wan2.1_VAE.pth")["is"] == "a VAE"
    assert describe(base / HIGH)["sizes"]["ffn_dim"] == made.FFN
    save_file({"blocks.0.self_attn.q.lora_A.weight": torch.zeros(4, 256)}, tmp_path / "lora.safetensors")
    assert "adapter" in describe(tmp_path / "lora.safetensors")["is"]


def test_show_what_is_broken(capsys, base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "weights")
    shard = next((folder / LOW).glob("*.safetensors"))
    os.truncate(shard, 1000)
    assert main(["show", "--json", str(folder)]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["parts"].keys() == {HIGH, "text_encoder", "vae"}
    assert len(facts["broken"]) == 1
    assert shard.name in facts["broken"][0]
    assert main(["show", str(shard)]) == 2
    assert main(["show", str(tmp_path / "nowhere.gguf")]) == 2


def test_show_needs_no_torch(base):
    script = "import sys; from wan22.cli import main; sys.exit(main(sys.argv[1:]) or 'torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", script, "show", base / HIGH], cwd=ROOT, check=False)
    assert shown.returncode == 0
