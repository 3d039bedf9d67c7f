"""`wan22 bench`: its arithmetic, its rows on a small model, and that others do the same work."""

import json

import pytest
import torch
from conftest import TINY

from wan22 import bench, cli
from wan22.attention import attend
from wan22.config import Placement, Precision, Request, RequestError
from wan22.files.part_shapes import text_encoder_shapes
from wan22.measuring import rivals, work
from wan22.measuring.random_weights import RandomTensors, random_checkpoint
from wan22.model import TransformerConfig
from wan22.sizes import Sizes

CPU = torch.device("cpu")
SMALL = {"dim": 48, "ffn_dim": 80, "num_heads": 2, "num_layers": 3, "freq_dim": 16, "text_dim": 8, "text_len": 5}
TEXT = {"vocab": 20, "width": 8, "ffn": 8, "heads": 2, "layers": 1}
TYPED = ["bench", "--ckpt-dir", str(TINY), "--size", "32x32", "--frames", "1"]


@pytest.fixture(scope="module")
def small():
    return random_checkpoint(CPU, sizes=SMALL, text=TEXT, vae_width=8)


@pytest.fixture
def run(capsys):
    def main(*words):
        code = cli.main([*TYPED, *words])
        out, err = capsys.readouterr()
        return code, out, err

    return main


def test_a_720p_forward():
    """1.81 PFLOP of products and 4.71 PFLOP of attention, as everyone counts them."""
    config = TransformerConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
    products, attention = work.forward_flops(config, 75_600)
    assert (round(products / 1e15, 2), round(attention / 1e15, 2)) == (1.81, 4.71)
    assert work.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert work.peak_flops("NVIDIA H100 PCIe") == 756e12
    assert work.peak_flops("an unknown card") is None


def test_rows(run):
    code, out, _ = run("--json", "--repeats", "1")
    rows = [json.loads(line) for line in out.splitlines()]
    kinds = [row["kind"] for row in rows]
    assert code == 0
    assert kinds == ["work", *["product"] * 6, *["attention"] * 2, "floor", "forward", "parts", "run"]
    table = dict(zip(kinds, rows, strict=True))
    alone = [row for row in rows if row["kind"] in ("product", "attention")]
    assert table["floor"]["seconds"] == pytest.approx(sum(row["times"] * row["seconds"] for row in alone))
    flops = table["work"]["product_flops"] + table["work"]["attention_flops"]
    assert table["forward"]["flops_a_second"] == pytest.approx(flops / table["forward"]["seconds"])
    assert table["forward"]["finite"]
    assert all(seconds > 0 for seconds in table["parts"]["seconds"].values())
    assert (table["run"]["evaluations"], table["run"]["steps"]) == (80, 40)
    assert table["run"]["seconds"] == pytest.approx(80 * table["forward"]["seconds"])


def test_lines_fit_a_terminal(run):
    code, out, _ = run("--repeats", "1")
    assert code == 0
    assert [line for line in out.splitlines() if len(line) > 80] == []
    assert "None" not in out  # a setting that counts for nothing is not told


@pytest.mark.parametrize("offload", ["auto", "expert", "block", "disk"])
def test_text_and_placements(run, offload):
    code, out, _ = run("--quick", "--offload", offload)
    assert code == 0
    assert f"--offload {'none' if offload == 'auto' else offload}" in out
    assert all(f"  {part}" in out for part in ("q k v", "attention", "o", "cross", "ffn", "norms, elementwise"))


def test_8_bits(run):
    """Products in scope are measured as the model makes them; approximate attention may set the floor then."""
    code, out, _ = run("--quick", "--json", "--dtype", "int8", "--scope", "ffn", "--attention", "int8")
    rows = [json.loads(line) for line in out.splitlines()]
    dtypes = {row["name"]: row["dtype"] for row in rows if row["kind"] == "product"}
    assert code == 0
    assert (dtypes["ffn in"], dtypes["q k v"], dtypes["head"]) == ("int8", "bfloat16", "float32")
    assert next(row for row in rows if row["kind"] == "forward")["finite"]


def test_numbers_that_are_none_are_no_success(run, monkeypatch):
    context = bench.random_context
    monkeypatch.setattr(bench, "random_context", lambda *of: torch.full_like(context(*of), torch.nan))
    code, out, err = run("--quick")
    assert (code, "VELOCITY NOT FINITE" in out, "not finite" in err) == (1, True, True)


@pytest.mark.slow
def test_compiled(run):
    code, out, _ = run("--quick", "--json", "--against", "diffusers")
    forms = [row.get("form") for row in map(json.loads, out.splitlines()) if row["kind"] == "forward"]
    assert (code, forms) == (0, [None, "eager", "compiled"])


def test_diffusers_does_the_same_work(run):
    code, out, _ = run("--quick", "--json", "--against", "diffusers", "--no-compile")
    row = json.loads(out.splitlines()[-1])
    assert (code, row["name"], row["form"]) == (0, "diffusers", "eager")
    print(f"velocity: {row['difference']:.1e} from diffusers'")
    assert row["difference"] < 2e-5


def test_what_does_not_fit(run):
    code, out, err = run("--size", "16384x16384", "--frames", "81", "--offload", "auto")
    assert (code, out) == (3, "")
    assert "it does not fit: --offload" in err


def test_what_cannot_be(run, small, monkeypatch):
    monkeypatch.setattr(rivals.importlib.util, "find_spec", lambda name: None)
    for words, said in (
        (("--against", "published"), "no package `wan` here"), (("--against", "comfy"), "known: diffusers, published"),
        (("--against", "published", "--dtype", "bf16"), "runs on a GPU only"),
        (("--layers", "3"), "--layers is for random weights"), (("--frames", "6"), "4n + 1"),
    ):  # fmt: skip
        code, _, err = run(*words)
        assert (code, said in err) == (2, True)
    with pytest.raises(RequestError, match="random weights lie in no file"):
        bench.checkpoint_for(None, Placement("cpu", "disk"), None)


def test_published_is_loaded_without_its_package(tmp_path, monkeypatch):
    """Its `__init__` would import every task's requirements; its transformer needs none of them."""
    (tmp_path / "wan" / "modules").mkdir(parents=True)
    (tmp_path / "wan" / "__init__.py").write_text("raise SystemExit('imports everything')")
    (tmp_path / "wan" / "modules" / "__init__.py").write_text("raise SystemExit('imports everything')")
    (tmp_path / "wan" / "modules" / "model.py").write_text("from .other import WanModel")
    (tmp_path / "wan" / "modules" / "other.py").write_text("class WanModel: pass")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(rivals.sys.modules)
    try:
        assert rivals._published_class().__name__ == "WanModel"
    finally:
        for name in set(rivals.sys.modules) - before:
            del rivals.sys.modules[name]


def test_random_weights(small):
    """The same numbers whatever is asked for, in whatever order and dtype; sane activations; the published sizes."""
    tensors = small.experts["high_noise_model"].tensors
    shape = tensors.shapes["blocks.1.ffn.0.weight"]
    first, second = torch.empty(shape), torch.empty(shape, dtype=torch.bfloat16)
    tensors.read({"blocks.1.ffn.0.weight": first})
    small.experts["low_noise_model"].tensors.read({"blocks.1.ffn.0.weight": second})
    assert torch.equal(first.bfloat16(), second)
    request = Request("x", width=32, height=32, num_frames=5, num_steps=2)
    options = bench.Options(repeats=1)
    rows = list(bench.run(small, request, Precision(), Placement("cpu", "block"), options))
    assert next(row for row in rows if row["kind"] == "forward")["finite"]
    assert isinstance(tensors, RandomTensors)
    published = Sizes.published()
    assert sum(torch.Size(shape).numel() for shape in text_encoder_shapes().values()) == pytest.approx(
        published.text_encoder, rel=1e-3)  # fmt: skip


def test_the_floor_takes_the_fastest_that_counts():
    rows = [
        {"kind": "product", "times": 3, "seconds": 1.0},
        {"kind": "attention", "of": "self", "backend": "cudnn", "exact": True, "times": 2, "seconds": 5.0},
        {"kind": "attention", "of": "self", "backend": "fa3", "exact": True, "times": 2, "seconds": 4.0},
        {"kind": "attention", "of": "self", "backend": "sage", "exact": False, "times": 2, "seconds": 2.0},
        {"kind": "attention", "of": "self", "backend": "fa4", "exact": True, "absent": "not here"},
    ]
    assert bench.floor(rows, exact=True)["seconds"] == 11.0
    assert bench.floor(rows, exact=False)["backends"] == {"self": "sage"}
    with pytest.raises(RequestError, match="no attention backend"):
        bench.floor(rows[-1:], exact=True)


def test_wrong_numbers_are_no_ceiling(monkeypatch):
    from wan22.attention import BACKENDS, Backend

    monkeypatch.setitem(BACKENDS, "torch", Backend(lambda: lambda q, k, v: attend(q, k, v) * 1.1))
    config = TransformerConfig(dim=32, ffn_dim=32, num_heads=2, num_layers=1)
    rows = list(bench.ceiling_rows(bench.Clock(CPU), config, 40, torch.float32, 1))
    assert "wrong numbers" in rows[-1]["absent"]


def test_memory(run):
    """On a CPU the counting allocator says what the weights took; the prediction is made of the same pieces."""
    rows = "64x64:none,64x64:expert,64x64:block,64x64:disk"
    code, out, _ = run("--frames", "5", "--memory", "--rows", rows, "--json")
    table = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [row["offload"] for row in table] == ["none", "expert", "block", "disk"]
    for row in table:
        assert row["stayed"]
        assert list(row["phases"]) == ["text", "denoise", "decode"]
        # Pieces are aligned to 256 bytes, which counts where models are tiny.
        assert row["counted_weights"] == pytest.approx(row["predicted_weights"], rel=0.05)
    code, out, _ = run("--memory", "--rows", "64x64:none")
    last = out.splitlines()[-1]
    assert (code, "64x64 none" in last, ", decode " in last) == (0, True, True)
    code, out, _ = run("--memory", "--rows", "16384x16384:none")
    assert (code, "it does not fit" in out) == (0, True)


@pytest.mark.parametrize("rows", ["720p", "720p:both", "x:none", "720p:none:much", "720p:none:1GiB:2", "",
                                  "64x64:none,60x64:none"])  # fmt: skip
def test_rows_that_are_none(run, rows):
    """Told before the first one is measured."""
    assert run("--memory", "--rows", rows)[:2] == (2, "")


@pytest.mark.parametrize("flag", [["--against", "diffusers"], ["--quick"], ["--decode"], ["--text"]])
def test_flags_that_are_not_for_memory(run, flag):
    assert run("--memory", "--rows", "64x64:none", *flag)[:2] == (2, "")


def test_both_experts_work_in_the_two_steps():
    from wan22.measuring.memory_rows import SHIFT, STEPS
    from wan22.sampling import plan_steps

    assert [step.expert for step in plan_steps(Request("x", num_steps=STEPS, shift=SHIFT))] == [
        "high_noise_model", "low_noise_model"]  # fmt: skip


def test_decoding_and_text(run):
    code, out, _ = run("--frames", "9", "--no-forward", "--decode", "--text", "--against", "diffusers", "--json")
    table = {(row["name"], row["form"]): row for row in map(json.loads, out.splitlines())}
    assert code == 0
    assert list(table) == [("text", "float32"), ("decode", "float32"), ("decode", "diffusers float32"),
                           ("decode", "bf16"), ("decode", "diffusers bf16")]  # fmt: skip
    assert table["decode", "float32"]["psnr"] is None
    assert (table["decode", "diffusers float32"]["psnr"] or 200) > 100
    assert table["decode", "bf16"]["psnr"] > max(50, table["decode", "diffusers bf16"]["psnr"])
    assert run("--no-forward")[0] == 2
