"""8-bit products: what an expert weighs, that it is read, merged, placed and streamed alike, and how far it drifts."""

import json

import pytest
import torch
from conftest import GOLDEN
from safetensors.torch import load_file
from test_placements import HIGH, LOW, REQUEST, adapter, deep  # noqa: F401 (fixtures)

from wan22.checkpoint import open_checkpoint
from wan22.config import Lora, Placement, Precision, Request, RequestError, Residency
from wan22.convert import convert
from wan22.experts import Experts
from wan22.load import eight_bit_of, empty_expert, load_expert
from wan22.machine import Room
from wan22.model import TransformerConfig, WanTransformer
from wan22.pack import pack
from wan22.pipeline import Pipeline
from wan22.plan import make_plan
from wan22.quantize import EightBit, EightBitLinear, quantize, read_quantized
from wan22.report import Reporter
from wan22.residency.memory import Memory
from wan22.sizes import Sizes, total, weight_terms

CPU = torch.device("cpu")
EVERY = [EightBit(kind, scope) for kind in ("fp8", "int8") for scope in ("ffn", "all")]


def name(eight_bit):
    return f"{eight_bit.kind}-{eight_bit.scope}"


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def velocity(model, case=0):
    data = load_file(GOLDEN / "dit.safetensors")
    with torch.inference_mode():
        context = model.embed_context(data[f"{case}.context"][None])
        return model(data[f"{case}.latents"][None], data[f"{case}.timestep"], context)[0]


@pytest.mark.parametrize("eight_bit", EVERY, ids=name)
def test_error_of_a_velocity(tiny, eight_bit):
    exact = velocity(load_expert(tiny.experts[HIGH], torch.float32, CPU))
    half = velocity(load_expert(tiny.experts[HIGH], torch.bfloat16, CPU))
    model = load_expert(tiny.experts[HIGH], torch.bfloat16, CPU, eight_bit=eight_bit)
    ours = velocity(model)
    error = (ours - exact).abs()
    print(f"{name(eight_bit)}: relative error {relative(ours, exact):.2e}, largest {error.max():.2e}, mean "
          f"{error.mean():.2e}; bf16 {relative(half, exact):.2e}")  # fmt: skip
    assert relative(half, exact) < relative(ours, exact) < 0.08


def test_what_stays(tiny):
    model = load_expert(tiny.experts[HIGH], torch.bfloat16, CPU, eight_bit=EightBit("int8", "all"))
    block = model.blocks[0]
    eight = {name for name, module in block.named_modules() if isinstance(module, EightBitLinear)}
    assert eight == {"self_attn.qkv", "self_attn.o", "cross_attn.q", "cross_attn.o", "ffn.0", "ffn.2"}
    assert block.cross_attn.kv.weight.dtype == torch.bfloat16
    for part in (model.head, model.text_embedding, model.time_embedding, model.time_projection):
        assert not any(isinstance(module, EightBitLinear) for module in part.modules())
    # Published names all the same, the scales beside them.
    published = set(load_expert(tiny.experts[HIGH], torch.bfloat16, CPU).state_dict())
    more = set(model.state_dict()) - published
    assert published <= set(model.state_dict())
    assert {name.rpartition(".")[2] for name in more} == {"weight_scale"}
    assert len(more) == 8 * len(model.blocks)


@pytest.mark.parametrize("eight_bit", EVERY, ids=name)
def test_read_in_8_bits_is_quantized_from_float32(tiny, eight_bit):
    """And a model that is there already, packed or not, becomes the same."""
    read = load_expert(tiny.experts[HIGH], torch.bfloat16, CPU, eight_bit=eight_bit).state_dict()
    whole = empty_expert(tiny.experts[HIGH], torch.float32)
    for packed in (False, True):
        exact = load_expert(tiny.experts[HIGH], torch.float32, CPU).state_dict()
        if packed:
            model = load_expert(tiny.experts[HIGH], torch.float32, CPU)
        else:
            model = whole
            model.load_state_dict(exact, strict=True, assign=True)
        quantize(model, eight_bit)
        for key, tensor in model.state_dict().items():
            if tensor.dtype.itemsize == 1 or key.endswith("weight_scale"):
                assert torch.equal(tensor.float(), read[key].float()), key


def test_few_at_a_time(monkeypatch):
    """Never more float32 numbers wait than there is room for, or than one layer has."""
    config = TransformerConfig(dim=64, ffn_dim=128, num_heads=2, num_layers=2, freq_dim=16, text_dim=8, text_len=5)
    with torch.device("meta"):
        model = WanTransformer(config, torch.bfloat16)
    quantize(model, EightBit("int8", "all"))
    monkeypatch.setattr("wan22.quantize.ROOM_BYTES", 4 * 64 * 128)
    state = {key: torch.empty_like(tensor, device="cpu") for key, tensor in model.state_dict().items()}
    asked = []

    def read(targets):
        asked.append(sum(target.numel() for key, target in targets.items() if state[key].dtype == torch.int8))
        for target in targets.values():
            target.fill_(0.5)

    read_quantized(state, read)
    assert max(asked) <= 64 * 128
    assert sum(asked) == sum(tensor.numel() for tensor in state.values() if tensor.dtype == torch.int8)
    assert all((state[key].float() == 127).all() for key in state if state[key].dtype == torch.int8)


def test_an_8_bit_file_keeps_its_numbers(tiny, tmp_path):
    """What `wan22 convert --dtype fp8` wrote is what an fp8 run computes with, to the last bit."""
    converted = open_checkpoint(convert(tiny, tmp_path / "fp8", "fp8"))
    ours = load_expert(converted.experts[LOW], torch.bfloat16, CPU, eight_bit=EightBit("fp8", "ffn")).state_dict()
    whole = load_expert(tiny.experts[LOW], torch.bfloat16, CPU, eight_bit=EightBit("fp8", "ffn")).state_dict()
    for key, tensor in ours.items():
        if tensor.dtype == torch.float8_e4m3fn:
            stored = next(load_file(file)[key] for file in (converted.folder / LOW).glob("*.safetensors")
                          if key in load_file(file))  # fmt: skip
            assert torch.equal(tensor.view(torch.uint8), stored.view(torch.uint8))
            assert torch.equal(tensor.view(torch.uint8), whole[key].view(torch.uint8))


# --- memory and placements -------------------------------------------------------------------------------------------
def test_bytes_as_planned(tiny):
    published = Sizes.published()
    half = published.expert_bytes(2)
    for precision in (Precision(kind, scope=scope) for kind in ("fp8", "int8") for scope in ("ffn", "all")):
        state = empty_expert(tiny.experts[HIGH], torch.bfloat16, eight_bit_of(precision)).state_dict()
        assert Sizes.of(tiny).at(precision).expert_bytes(2) == sum(tensor.nbytes for tensor in state.values())
        print(f"{precision.weights} {precision.scope}: {published.at(precision).expert_bytes(2) / half:.1%} of bf16")
    # Keys and values of cross-attention stay as they are, a seventh of it.
    assert published.at(Precision("fp8", scope="all")).expert_bytes(2) < 0.6 * half
    assert published.at(Precision()) == published
    request = Request("x", width=832, height=480)
    weights = []
    for kind in ("bf16", "fp8"):
        options = make_plan(request, Precision(kind), Placement(), published, None, Room(1 << 40, 1 << 40)).options
        weights.append(options[0].phases["denoise"]["experts"])
    assert weights[1] < 0.6 * weights[0]


def denoised(checkpoint, residency, eight_bit, loras=()):
    pipe = Pipeline(checkpoint, Precision(eight_bit.kind, scope=eight_bit.scope), Placement("cpu"))
    memory = Memory(CPU, has_host=True)
    pipe.experts = Experts(checkpoint, torch.bfloat16, CPU, pipe.adapters, [residency], memory, eight_bit)
    pipe.experts.use = lambda ladder: None
    request = pipe.resolve(Request.from_dict({**REQUEST.to_dict(), "num_steps": 3, "loras": list(loras)}))
    return pipe.denoise(request, Reporter()), pipe, memory


@pytest.mark.parametrize("with_adapter", [False, True])
def test_placements_are_bit_identical(deep, adapter, with_adapter):  # noqa: F811
    eight_bit, loras = EightBit("fp8", "all"), [Lora(str(adapter), 0.8)] if with_adapter else []
    expected, pipe, memory = denoised(deep, Residency("none"), eight_bit, loras)
    sizes = Sizes.of(deep).at(pipe.precision)
    assert 0 <= memory.on_device.peak / total(weight_terms(Residency("none"), sizes, 2)) - 1 < 0.02
    for residency in (Residency("expert", 0, 1), Residency("block", 2, 1), Residency("block", 0, 2), Residency("disk")):
        latents, _, memory = denoised(deep, residency, eight_bit, loras)
        assert torch.equal(latents, expected), residency


def test_adapters_are_merged_before(deep, adapter):  # noqa: F811
    """Quantizing first would lose an adapter that is smaller than a step."""
    pipe = Pipeline(deep, Precision("int8"), Placement("cpu"))
    loras = pipe.resolve(Request("x", width=32, height=32, num_frames=1, loras=(Lora(str(adapter), 0.8),))).loras
    merges = pipe.adapters.merges("high", loras)
    eight = load_expert(deep.experts[HIGH], torch.bfloat16, CPU, merges, EightBit("int8", "all")).state_dict()
    exact = load_expert(deep.experts[HIGH], torch.float32, CPU, merges).state_dict()
    layer = "blocks.0.self_attn.q.weight"
    ours = eight[layer].float() * eight[layer + "_scale"]
    assert (ours - exact[layer]).abs().max() <= eight[layer + "_scale"].max() * 0.501


# --- asking for it ---------------------------------------------------------------------------------------------------
def test_whole_runs_and_their_record(tiny):
    """Drift of latents on the tiny checkpoint, of random weights; the demo's stands in docs/speed.md."""
    request = Request("a red ball", "blurred", width=32, height=32, num_frames=5, num_steps=4, shift=5.0, seed=7)
    exact = Pipeline(tiny, Precision("bf16")).generate(request)
    for precision in (Precision("fp8", scope="ffn"), Precision("fp8"), Precision("int8"), Precision("int8", "int8"),
                      Precision("bf16", "int8-bf16")):  # fmt: skip
        ours = Pipeline(tiny, precision).generate(request)
        print(f"{precision}: latents' relative error {relative(ours.latents, exact.latents):.2e}")
        assert 0 < relative(ours.latents, exact.latents) < 0.1
        recorded = ours.record["precision"]
        assert recorded["scope"] == (precision.scope or ("all" if "8" in precision.weights else None))
        assert Precision.from_dict(recorded).resolve("cpu").to_dict() == recorded
        assert json.loads(json.dumps(recorded)) == recorded


def test_wrong_settings():
    for table, said in (({"weights": "fp4"}, "--dtype fp4"), ({"scope": "ffn"}, "--scope ffn"),
                        ({"weights": "fp8", "scope": "half"}, "--scope half"),
                        ({"step_cache": -1}, "--step-cache")):  # fmt: skip
        with pytest.raises(RequestError, match=said):
            Precision.from_dict(table)


def test_packing_8_bit_layers():
    """Packed layers of other kinds than nn.Linear, and what cannot be packed."""
    config = TransformerConfig(dim=32, ffn_dim=64, num_heads=2, num_layers=1, freq_dim=16, text_dim=8, text_len=5)
    model = WanTransformer(config, torch.bfloat16)
    model.init_weights(torch.Generator().manual_seed(0))
    quantize(model, EightBit("int8", "all"))
    with pytest.raises(AssertionError, match="apart"):
        pack(model)

