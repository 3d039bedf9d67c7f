"""What a card can do, with cards that are not there; presets, and what is refused."""

import pytest
from conftest import TINY

from wan22 import capability, cli, machine, options, pipeline
from wan22.capability import preset, resolve
from wan22.config import Precision, RequestError

HOPPER, ADA, AMPERE, GAMING_AMPERE, TURING = (9, 0), (8, 9), (8, 0), (8, 6), (7, 5)


@pytest.mark.parametrize(("card", "weights", "attention"), [
    (HOPPER, "fp8", "int8"), (ADA, "fp8", "int8"), ((12, 0), "fp8", "int8"), (AMPERE, "int8", "int8-bf16"),
    (GAMING_AMPERE, "int8", "int8-bf16"),
])  # fmt: skip
def test_presets(card, weights, attention):
    fast, high, exact = (resolve(Precision(**preset(name, card)), "cuda", card) for name in ("fast", "high", "exact"))
    assert fast == Precision(weights, attention, scope="all", step_cache=capability.FAST_STEP_CACHE, vae="bf16")
    assert high == Precision(weights, attention, scope="ffn", vae="bf16")
    assert exact == Precision("bf16")


@pytest.mark.parametrize("name", ["fast", "high"])
def test_no_preset_where_nothing_of_it_works(name):
    with pytest.raises(RequestError, match=r"7\.5; 8-bit products need 8\.0"):
        preset(name, TURING)
    with pytest.raises(RequestError, match="needs a GPU") as error:
        preset(name, None)
    assert "--dtype int8" in error.value.hint
    assert preset("exact", None) == preset("exact", TURING)
    with pytest.raises(RequestError, match="--precision faster: unknown"):
        preset("faster", HOPPER)


@pytest.mark.parametrize(("card", "precision", "said", "hint"), [
    (AMPERE, Precision("fp8"), "--dtype fp8: this card has compute capability 8.0; it needs 8.9", "--dtype int8"),
    (TURING, Precision("fp8"), "capability 7.5", "--dtype bf16"),
    (TURING, Precision("int8"), "--dtype int8: this card has compute capability 7.5; it needs 8.0", "--dtype bf16"),
    (TURING, Precision(attention="int8"), "--attention int8: this card", "--attention auto"),
    (TURING, Precision(attention="int8-bf16"), "--attention int8-bf16: this card", "--attention auto"),
])  # fmt: skip
def test_refused(card, precision, said, hint):
    with pytest.raises(RequestError) as error:
        resolve(precision, "cuda", card)
    assert said in str(error.value)
    assert error.value.hint == hint


def test_forms():
    for name in ("int8", "int8-bf16"):  # where they run at all, they are what they are called
        assert resolve(Precision(attention=name), "cuda", AMPERE).attention == name
    assert resolve(Precision(attention="int8"), "cuda", ADA).attention == "int8"
    assert resolve(Precision("int8"), "cuda", AMPERE).scope == "all"
    on_cpu = resolve(Precision("int8", "int8", step_cache=0.1), "cpu", None)
    assert on_cpu == Precision("int8", "int8", scope="all", step_cache=0.1)


def fake(monkeypatch, card):
    monkeypatch.setattr(machine, "gpu_capability", lambda device="cuda": card)
    monkeypatch.setattr(capability, "gpu_capability", lambda device="cuda": card)


FLAGS = {"precision": None, "dtype": None, "scope": None, "attention": None, "step_cache": None, "device": None,
         "convert_model_dtype": False, "vae_dtype": None}  # fmt: skip


def read(base=options.Base({}, {}, {}), **flags):  # noqa: B008
    return options.read_precision({**FLAGS, **flags}, base)


def test_flags_over_a_preset_over_a_base(monkeypatch):
    fake(monkeypatch, ADA)
    cache, vae = {"step_cache": capability.FAST_STEP_CACHE}, {"vae": "bf16"}
    assert read(precision="fast") == Precision("fp8", "int8", scope="all", **cache, **vae)
    assert read(precision="fast", step_cache=0.0, scope="ffn") == Precision("fp8", "int8", scope="ffn", **vae)
    assert read(precision="fast", dtype="bf16") == Precision("bf16", "int8", **cache, **vae)
    # The published flag casts experts to bf16, which 8-bit products are beside.
    assert read(convert_model_dtype=True) == Precision("bf16")
    assert read(precision="high", convert_model_dtype=True) == read(precision="high")
    assert read(dtype="int8", convert_model_dtype=True) == read(dtype="int8")
    with pytest.raises(RequestError, match="contradict"):
        read(dtype="float32", convert_model_dtype=True)
    base = options.Base({}, {"weights": "fp8", "scope": "all", "attention": "fa3"}, {})
    assert read(base) == Precision("fp8", "fa3", scope="all")
    assert read(base, dtype="float32") == Precision("float32", "fa3")
    assert read(base, precision="exact") == Precision()
    with pytest.raises(RequestError, match="--scope ffn"):
        read(scope="ffn")
    with pytest.raises(RequestError, match="needs a GPU"):
        read(precision="fast", device="cpu")


def run(capsys, *words):
    code = cli.main([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


SMALL = ["generate", "--ckpt_dir", TINY, "--size", "32x32", "--frames", "1", "--steps", "2", "--prompt", "x",
         "--seed", "1"]  # fmt: skip


def test_at_the_command_line(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *SMALL, "--precision", "fast", "--device", "cpu")
    assert (code, "error: --precision fast: needs a GPU" in err, "hint:" in err) == (2, True, True)
    code, _, err = run(capsys, *SMALL, "--precision", "best")
    assert (code, "known: exact, high, fast" in err) == (2, True)
    code, out, _ = run(capsys, *SMALL, "--dtype", "int8", "--scope", "ffn", "--attention", "int8", "--step-cache", ".1",
                       "--output", "a.mp4")  # fmt: skip
    assert (code, out) == (0, "a.mp4\n")
    _, out, _ = run(capsys, "show", "a.mp4")
    assert '"weights": "int8"' in out
    assert '"scope": "ffn"' in out
    assert '"step_cache": 0.1' in out
    assert '"attention": "int8"' in out
    # The file's own record makes it again, and another one of the same name is not made with other settings.
    code, _, _ = run(capsys, "generate", "--from", "a.mp4", "--ckpt_dir", TINY, "--output", "b.mp4")
    assert (code, (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()) == (0, True)


def test_a_card_that_cannot(capsys, monkeypatch, tmp_path):
    """The pipeline asks torch, which knows the card it runs on."""
    import torch

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: TURING)
    with pytest.raises(RequestError, match=r"capability 7\.5"):
        pipeline.resolve_precision(Precision("fp8"), torch.device("cuda"))
    monkeypatch.chdir(tmp_path)
    fake(monkeypatch, TURING)
    code, _, err = run(capsys, *SMALL, "--precision", "fast")
    assert (code, "7.5; 8-bit products need 8.0 (Ampere) or later" in err) == (2, True)


def test_plans(capsys, monkeypatch):
    fake(monkeypatch, None)
    words = ["plan", "--gpu-memory", "24GiB", "--host-memory", "128GiB", "--json"]
    import json

    def experts(*more):
        code, out, _ = run(capsys, *words, *more)
        assert code == 0
        return {o["offload"]: o for o in json.loads(out)["options"]}["none"]["phases"]["denoise"]

    assert experts("--dtype", "fp8")["experts"] < 0.6 * experts()["experts"]
    assert experts("--precision", "high")["experts"] == experts("--dtype", "int8", "--scope", "ffn")["experts"]
    assert "step cache" in experts("--precision", "fast")
    # The preset's settings one by one: the same plan.
    single = ["--dtype", "fp8", "--attention", "int8", "--step-cache", "0.2", "--vae-dtype", "bf16"]
    with monkeypatch.context() as patch:
        patch.setattr("wan22.options.capability_of", lambda device: HOPPER)
        assert run(capsys, *words, *single) == run(capsys, *words, "--precision", "fast")
    assert run(capsys, *words, "--attention", "fast")[0] == 2
    assert run(capsys, "plan", "--gpu-memory", "0", "--precision", "fast")[0] == 2


def test_asking_the_driver(monkeypatch):
    """nvidia-smi's words, where the library is not there."""
    monkeypatch.setattr(machine, "_capability_by_nvml", lambda card: None)
    monkeypatch.setattr(machine, "_query", lambda card, what: {"compute_cap": "8.6"}[what])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert machine.gpu_capability("cuda:0") == (8, 6)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert machine.gpu_capability() is None
