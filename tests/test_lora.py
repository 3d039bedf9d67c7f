"""Adapters: every key form against diffusers' own loader and the formula, merged exactly, recorded and found again."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY
from safetensors.torch import save_file

from wan22 import cli
from wan22.config import Lora, Placement, Precision, Request, RequestError, digest, load_preset
from wan22.load import load_expert
from wan22.lora import Adapters, find, open_adapter
from wan22.pipeline import Pipeline
from wan22.report import Reporter
from wan22.sampling import draw_noise, guided_velocity, make_solver, plan_steps

CPU = torch.device("cpu")
HIGH, LOW = "high_noise_model", "low_noise_model"
RANK = 4
ATTENTION = [f"blocks.{i}.{part}_attn.{x}" for i in range(3) for part in ("self", "cross") for x in "qkvo"]
LINEARS = [*ATTENTION, *(f"blocks.{i}.ffn.{j}" for i in range(3) for j in (0, 2))]
EMBEDDINGS = ["time_projection.1", "time_embedding.0", "time_embedding.2", "text_embedding.0", "text_embedding.2"]


@pytest.fixture(scope="module")
def shapes(tiny):
    return tiny.experts[HIGH].tensors.shapes


@pytest.fixture(scope="module")
def originals(tiny):
    return {name: dict(load_expert(expert, torch.float32, CPU).state_dict()) for name, expert in tiny.experts.items()}


def diffusers_name(module):
    """A published module's, by diffusers' own converter."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    ending = "" if module.endswith("modulation") else ".weight"
    return next(iter(convert_wan_transformer_to_diffusers({module + ending: None}))).removesuffix(ending)


def random(*shape, seed=[0]):  # noqa: B006 (counts the calls)
    seed[0] += 1
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed[0]))


def pairs(shapes, modules=LINEARS, rank=RANK):
    """Module → (down, up), of about a weight's own size; a convolution's keeps its kernel in `down`."""
    made = {}
    for module in modules:
        out, *rest = shapes[f"{module}.weight"]
        made[module] = (random(rank, *rest) * 0.2, random(out, rank, *[1] * (len(rest) - 1)) * 0.2)
    return made


def delta(down, up, scale=1.0):
    return (up.flatten(1).double() @ down.flatten(1).double() * scale).reshape(len(up), *down.shape[1:])


FORMS = {
    # name: module → key prefix, suffixes of down and up, whether `.alpha` is there
    "published, kohya suffixes, alpha": (lambda m: f"diffusion_model.{m}", "lora_down", "lora_up", True),
    "published, kohya suffixes": (lambda m: f"diffusion_model.{m}", "lora_down", "lora_up", False),
    "published, peft suffixes": (lambda m: f"diffusion_model.{m}", "lora_A", "lora_B", False),
    "published, peft suffixes, alpha": (lambda m: f"diffusion_model.{m}", "lora_A", "lora_B", True),
    "diffusers": (lambda m: f"transformer.{diffusers_name(m)}", "lora_A", "lora_B", False),
    "kohya": (lambda m: "lora_unet_" + m.replace(".", "_"), "lora_down", "lora_up", True),
    "kohya, no alpha": (lambda m: "lora_unet_" + m.replace(".", "_"), "lora_down", "lora_up", False),
    "kohya, two underscores": (lambda m: "lora_unet__" + m.replace(".", "_"), "lora_down", "lora_up", True),
    "bare": (lambda m: m, "lora_A", "lora_B", False),
    "bare, default": (lambda m: m, "lora_A.default", "lora_B.default", False),
    "bare, diffusers": (diffusers_name, "lora_A", "lora_B", True),
    "model": (lambda m: f"model.{m}", "lora_A", "lora_B", False),
    "model.diffusion_model": (lambda m: f"model.diffusion_model.{m}", "lora_down", "lora_up", True),
    "unet": (lambda m: f"unet.{m}", "lora_down", "lora_up", True),
    "peft": (lambda m: f"base_model.model.{m}", "lora_A", "lora_B", False),
}
CONVERTED = ["published, kohya suffixes, alpha", "published, kohya suffixes", "published, peft suffixes",
             "published, peft suffixes, alpha", "diffusers", "kohya"]  # fmt: skip


def write(path, made, form="published, kohya suffixes, alpha", alpha=2.0, dtype=torch.float32, extra=(), metadata=None):
    key, down, up, has_alpha = FORMS[form]
    tensors = {}
    for module, (low, high) in made.items():
        tensors[f"{key(module)}.{down}.weight"] = low.to(dtype)
        tensors[f"{key(module)}.{up}.weight"] = high.to(dtype)
        if has_alpha:
            tensors[f"{key(module)}.alpha"] = torch.tensor(alpha)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({**tensors, **dict(extra)}, path, metadata=metadata)
    return path


def merged(tiny, *loras, dtype=torch.float32, expert=HIGH):
    """An expert's tensors with adapters merged, by the way a run takes."""
    adapters = Adapters(tiny.experts[HIGH].tensors.shapes, [Path()], Path("no-cache"))
    merges = adapters.merges("high" if expert == HIGH else "low", adapters.resolve(loras))
    return dict(load_expert(tiny.experts[expert], dtype, CPU, merges).state_dict())


def assert_close(ours, originals, deltas):
    """`deltas` and nothing else was added; prints the largest error against float64."""
    assert deltas.keys() <= originals.keys()
    worst = 0.0
    for name, original in originals.items():
        if name in deltas:
            worst = max(worst, (ours[name].double() - original.double() - deltas[name]).abs().max().item())
        else:
            assert torch.equal(ours[name], original), name
    print(f"largest {worst:.2e}")
    assert worst < 1e-6


# --- key forms -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", FORMS)
def test_every_key_form_meets_the_formula(tiny, tmp_path, shapes, originals, form):
    made = pairs(shapes, [*LINEARS, *EMBEDDINGS, "head.head"])
    path = write(tmp_path / "a.safetensors", made, form)
    scale = 0.7 * (2.0 / RANK if FORMS[form][3] else 1)
    deltas = {f"{module}.weight": delta(*pair, scale) for module, pair in made.items()}
    assert_close(merged(tiny, Lora(str(path), 0.7)), originals[HIGH], deltas)


def covered(form):
    """What diffusers converts beyond the blocks: it rejects `.alpha` there, and kohya's names."""
    return [] if FORMS[form][3] else [*EMBEDDINGS, "head.head"]


def diffusers_state(path):
    """What diffusers' own loader makes of a file: its module → its delta."""
    from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin
    from safetensors.torch import load_file

    state = WanLoraLoaderMixin.lora_state_dict(load_file(path))
    state = {key.removeprefix("transformer."): tensor for key, tensor in state.items()}
    downs = [key.removesuffix(".lora_A.weight") for key in state if key.endswith(".lora_A.weight")]
    deltas = {f"{m}.weight": delta(state[f"{m}.lora_A.weight"], state[f"{m}.lora_B.weight"]) for m in downs}
    return deltas | {f"{m}.bias": state[f"{m}.lora_B.bias"].double() for m in downs if f"{m}.lora_B.bias" in state}


@pytest.mark.parametrize("form", CONVERTED)
def test_equal_to_diffusers_converters(tiny, tmp_path, shapes, originals, form):
    """Names and scales by diffusers' converters; the merged weights compared under diffusers' names."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    more = covered(form)
    path = write(tmp_path / "a.safetensors", pairs(shapes, [*LINEARS, *more]), form, alpha=3.0)
    theirs = {name: tensor * 0.7 for name, tensor in diffusers_state(path).items()}
    assert len(theirs) == len(LINEARS) + len(more)
    ours = convert_wan_transformer_to_diffusers(merged(tiny, Lora(str(path), 0.7)))
    assert_close(ours, convert_wan_transformer_to_diffusers(dict(originals[HIGH])), theirs)


@pytest.mark.parametrize(("form", "peft"), [*((form, {}) for form in CONVERTED), ("diffusers", {"use_rslora": True})])
def test_equal_to_diffusers_loader(tiny, tmp_path, shapes, originals, form, peft):
    """The whole of diffusers' loader, which wants peft (in the dev extra): load, fuse, compare."""
    pytest.importorskip("peft")
    from diffusers import WanTransformer3DModel
    from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    more = covered(form)
    biased = [*LINEARS, *more] if form.startswith("published") else []
    extra = {f"diffusion_model.{m}.diff_b": random(shapes[f"{m}.bias"][0]) for m in biased}
    if peft:
        targets = [diffusers_name(module) for module in [*LINEARS, *more]]
        peft = {f"transformer.{key}": value for key, value in
                {**peft, "r": RANK, "lora_alpha": 8, "target_modules": targets}.items()}  # fmt: skip
    path = write(tmp_path / "a.safetensors", pairs(shapes, [*LINEARS, *more]), form, alpha=3.0, extra=extra.items(),
                 metadata={"lora_adapter_metadata": json.dumps(peft)} if peft else None)  # fmt: skip
    config = tiny.experts[HIGH].transformer_config()
    theirs = WanTransformer3DModel(
        num_attention_heads=config.num_heads, attention_head_dim=config.head_dim, freq_dim=config.freq_dim,
        text_dim=shapes["text_embedding.0.weight"][1], ffn_dim=config.ffn_dim, num_layers=config.num_layers,
    )  # fmt: skip
    theirs.load_state_dict(convert_wan_transformer_to_diffusers(dict(originals[HIGH])))
    state, metadata = WanLoraLoaderMixin.lora_state_dict(str(path), return_lora_metadata=True)
    assert bool(metadata) == bool(peft)
    theirs.load_lora_adapter(state, metadata=metadata)
    theirs.fuse_lora(lora_scale=0.7)
    theirs.unload_lora()
    ours = convert_wan_transformer_to_diffusers(merged(tiny, Lora(str(path), 0.7)))
    worst = max((ours[name] - tensor).abs().max().item() for name, tensor in theirs.state_dict().items())
    print(f"largest {worst:.2e}")
    assert worst < 1e-6


@pytest.mark.parametrize("root", [False, True])
def test_diffusers_metadata_scales_as_peft_does(tiny, tmp_path, shapes, originals, root):
    made = pairs(shapes, ATTENTION)
    peft = {"transformer.r": RANK, "transformer.lora_alpha": 8, "transformer.use_rslora": root}
    path = write(tmp_path / "a.safetensors", made, "diffusers", metadata={"lora_adapter_metadata": json.dumps(peft)})
    scale = 8 / (RANK**0.5 if root else RANK)
    deltas = {f"{module}.weight": delta(*pair, scale) for module, pair in made.items()}
    assert_close(merged(tiny, Lora(str(path))), originals[HIGH], deltas)


def test_attention_only_kohya(tiny, tmp_path, shapes, originals):
    """diffusers' converter fails on these: KeyError for the missing feed-forward, or for the missing alpha."""
    made = pairs(shapes, ATTENTION)
    for form, scale in (("kohya", 0.5), ("kohya, no alpha", 1.0)):
        path = write(tmp_path / "a.safetensors", made, form)
        with pytest.raises(KeyError):
            diffusers_state(path)
        deltas = {f"{module}.weight": delta(*pair, scale) for module, pair in made.items()}
        assert_close(merged(tiny, Lora(str(path))), originals[HIGH], deltas)


@pytest.mark.parametrize("prefix", ["diffusion_model.", "", "transformer."])
def test_differences(tiny, tmp_path, shapes, originals, prefix):
    """Of weights, biases, norms, modulations (two spellings) and the patch embedding, which diffusers drops."""
    name_of = diffusers_name if prefix == "transformer." else lambda module: module
    biased = [*LINEARS, *EMBEDDINGS, "head.head", "patch_embedding"]
    norms = [f"blocks.{i}.{part}_attn.norm_{x}" for i in range(3) for part in ("self", "cross") for x in "qk"]
    norms += [f"blocks.{i}.norm3" for i in range(3)]
    keys = {f"{name_of(m)}.diff_b": f"{m}.bias" for m in biased} | {f"{name_of(m)}.diff": f"{m}.weight" for m in norms}
    keys |= {f"{name_of(m)}.diff": f"{m}.weight" for m in ("head.head", "patch_embedding", "blocks.1.ffn.0")}
    keys |= {"blocks.0.diff_m": "blocks.0.modulation", "head.diff_m": "head.modulation"}
    keys |= {f"{name_of('blocks.1.modulation')}.diff": "blocks.1.modulation"}
    extra = {f"{prefix}{key}": random(*shapes[name]) * 0.1 for key, name in keys.items()}
    extra[f"{prefix}blocks.0.diff_m"] = extra[f"{prefix}blocks.0.diff_m"][0]  # a leading 1 may be missing
    made = pairs(shapes, ["blocks.0.ffn.0", "patch_embedding", "head.head"])
    form = "diffusers" if prefix == "transformer." else "published, peft suffixes"
    path = write(tmp_path / "a.safetensors", made, form, extra=extra.items())
    deltas = {name: extra[prefix + key].double().reshape(shapes[name]) * 0.5 for key, name in keys.items()}
    for module, pair in made.items():
        deltas[f"{module}.weight"] = deltas.get(f"{module}.weight", 0) + delta(*pair, 0.5)
    assert_close(merged(tiny, Lora(str(path), 0.5)), originals[HIGH], deltas)


def test_bias_differences_are_those_of_diffusers(tiny, tmp_path, shapes, originals):
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    extra = {f"diffusion_model.{m}.diff_b": random(shapes[f"{m}.bias"][0]) for m in LINEARS}
    path = write(tmp_path / "a.safetensors", pairs(shapes), extra=extra.items())
    theirs = diffusers_state(path)
    assert len(theirs) == 2 * len(LINEARS)
    ours = convert_wan_transformer_to_diffusers(merged(tiny, Lora(str(path))))
    assert_close(ours, convert_wan_transformer_to_diffusers(dict(originals[HIGH])), theirs)


def test_names_are_those_of_diffusers(shapes):
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    names = {name.replace(".", "_"): name for name in shapes}
    for name in shapes:
        theirs = next(iter(convert_wan_transformer_to_diffusers({name: None})))
        kind = "diff_b" if name.endswith(".bias") else "diff"
        for spelled in (name, theirs, f"lora_unet_{name.replace('.', '_')}"):
            module = spelled.removesuffix(".weight").removesuffix(".bias").removesuffix("_weight").removesuffix("_bias")
            assert find(f"{module}.{kind}", names) == (None, "diff", name)


def test_image_keys_are_left_out_with_a_warning(tiny, tmp_path, shapes, originals):
    made = pairs(shapes, ATTENTION)
    extra = {f"diffusion_model.blocks.{i}.cross_attn.{x}.lora_{half}.weight": random(4, 4)
             for i in range(3) for x in ("k_img", "v_img") for half in ("up", "down")}  # fmt: skip
    extra |= {"diffusion_model.img_emb.proj.1.diff_b": random(4),
              "diffusion_model.blocks.0.cross_attn.norm_k_img.diff": random(4)}  # fmt: skip
    path = write(tmp_path / "a.safetensors", made, extra=extra.items())
    adapters = Adapters(shapes, [], Path("no-cache"))
    resolved = adapters.resolve([Lora(str(path))])
    (warning,) = adapters.warnings(resolved)
    assert warning == "a.safetensors: 14 tensors belong to an image-to-video model and are left out"
    deltas = {f"{module}.weight": delta(*pair, 0.5) for module, pair in made.items()}
    assert_close(merged(tiny, Lora(str(path))), originals[HIGH], deltas)


# --- merging ---------------------------------------------------------------------------------------------------------
def test_several_are_summed_in_float32_and_rounded_once(tiny, tmp_path, shapes, originals):
    first, second = pairs(shapes), pairs(shapes, ATTENTION)
    loras = [Lora(str(write(tmp_path / "1.safetensors", first, dtype=torch.bfloat16)), 1.0),
             Lora(str(write(tmp_path / "2.safetensors", second, "diffusers", dtype=torch.float16)), -0.4)]  # fmt: skip
    whole = merged(tiny, *loras)
    deltas = {f"{m}.weight": delta(*(t.bfloat16() for t in pair), 0.5) for m, pair in first.items()}
    for module, pair in second.items():
        deltas[f"{module}.weight"] = deltas[f"{module}.weight"] + delta(*(t.half() for t in pair), -0.4)
    assert_close(whole, originals[HIGH], deltas)
    for name, tensor in merged(tiny, *loras, dtype=torch.bfloat16).items():
        assert torch.equal(tensor, whole[name].to(tensor.dtype)), name


def test_the_buffers_size_changes_no_bit(tiny, tmp_path, shapes, monkeypatch):
    lora = Lora(str(write(tmp_path / "a.safetensors", pairs(shapes), dtype=torch.bfloat16)), 0.3)
    whole = merged(tiny, lora, dtype=torch.bfloat16)
    monkeypatch.setattr("wan22.files.reading.BUFFER_BYTES", 1000)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in merged(tiny, lora, dtype=torch.bfloat16).items())


def test_strength_zero_is_no_adapter(tiny, tmp_path, shapes):
    infinite = {"head.head.diff": random(64, 128) * torch.inf}
    path = write(tmp_path / "a.safetensors", pairs(shapes), extra=infinite.items())
    for dtype in (torch.float32, torch.bfloat16):
        ours, plain = merged(tiny, Lora(str(path), 0.0), dtype=dtype), merged(tiny, dtype=dtype)
        for name, tensor in plain.items():
            assert torch.equal(ours[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_one_float32_tensor_at_a_time(tiny, tmp_path, shapes, monkeypatch):
    """Beside the model itself there is one whole tensor, and the pair that changes it."""
    path = write(tmp_path / "a.safetensors", pairs(shapes))
    seen = []
    read = type(tiny.experts[HIGH].tensors).read

    def watched(source, targets, *begins):
        seen.append((len(targets), sum(tensor.nbytes for tensor in targets.values())))
        return read(source, targets, *begins)

    monkeypatch.setattr("wan22.files.tensor_files.Safetensors.read", watched)
    merged(tiny, Lora(str(path)), dtype=torch.bfloat16)
    largest = max(4 * shapes[f"{module}.weight"][0] * shapes[f"{module}.weight"][1] for module in LINEARS)
    assert len(seen) == 1 + 2 * len(LINEARS)
    assert all(count <= 3 and size <= largest for count, size in seen[1:])


def test_the_files_are_not_touched(tiny, tmp_path, shapes):
    path = write(tmp_path / "a.safetensors", pairs(shapes))
    before = path.read_bytes(), path.stat().st_mtime_ns
    merged(tiny, Lora(str(path)))
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


# --- which expert ----------------------------------------------------------------------------------------------------
def resolve(shapes, *loras, places=()):
    return [(lora.file, lora.expert) for lora in Adapters(shapes, list(places), Path("no-cache")).resolve(loras)]


@pytest.mark.parametrize(
    ("high", "low"),
    [("high_noise_model", "low_noise_model"), ("wan2.2_t2v_A14b_high_noise_r64", "wan2.2_t2v_A14b_low_noise_r64"),
     ("Style_HIGH_fp16", "Style_LOW_fp16"), ("style-HighNoise", "style-LowNoise"), ("high", "low")],
)  # fmt: skip
def test_pairs(tmp_path, shapes, high, low):
    made = pairs(shapes, ATTENTION[:1])
    for name in (high, low):
        write(tmp_path / "pair" / f"{name}.safetensors", made)
    both = [(f"{high}.safetensors", "high"), (f"{low}.safetensors", "low")]
    assert resolve(shapes, Lora(str(tmp_path / "pair"))) == both
    assert resolve(shapes, Lora("pair"), places=[tmp_path]) == both
    assert resolve(shapes, Lora(str(tmp_path / "pair"), expert="low")) == both[1:]
    for name, side in both:
        assert resolve(shapes, Lora(str(tmp_path / "pair" / name))) == [(name, side)]


def test_single_files_are_for_both_unless_they_tell(tmp_path, shapes):
    made = pairs(shapes, ATTENTION[:1])
    for name in ("style", "high_quality", "low-poly", "HIGH"):
        write(tmp_path / f"{name}.safetensors", made)
        assert resolve(shapes, Lora(str(tmp_path / f"{name}.safetensors")))[0][1] == "both"
        assert resolve(shapes, Lora(str(tmp_path / f"{name}.safetensors"), expert="low"))[0][1] == "low"
    for metadata, side in (({"ss_output_name": "mine_low_noise"}, "low"),
                           ({"ss_sd_model_name": "wan2.2_t2v_high_noise_14B_fp16.safetensors"}, "high"),
                           ({"ss_sd_model_name": "wan2.2_t2v_low_noise_14B_fp16.safetensors"}, "both")):  # fmt: skip
        write(tmp_path / "m.safetensors", made, metadata=metadata)
        assert resolve(shapes, Lora(str(tmp_path / "m.safetensors")))[0][1] == side
    write(tmp_path / "alone" / "adapter_model.safetensors", made)
    assert resolve(shapes, Lora(str(tmp_path / "alone"))) == [("adapter_model.safetensors", "both")]


def test_keys_tell_the_expert(tiny, tmp_path, shapes, originals):
    made, other = pairs(shapes, ATTENTION), pairs(shapes, ATTENTION)
    for of_high, of_low in (("high_noise_model.", "low_noise_model."), ("transformer.", "transformer_2.")):
        tensors = {}
        for prefix, part in ((of_high, made), (of_low, other)):
            for module, (down, up) in part.items():
                tensors[f"{prefix}{module}.lora_A.weight"], tensors[f"{prefix}{module}.lora_B.weight"] = down, up
        save_file(tensors, tmp_path / "a.safetensors")
        lora = Lora(str(tmp_path / "a.safetensors"))
        assert resolve(shapes, lora) == [("a.safetensors", "both")]
        for expert, part in ((HIGH, made), (LOW, other)):
            deltas = {f"{module}.weight": delta(*pair) for module, pair in part.items()}
            assert_close(merged(tiny, lora, expert=expert), originals[expert], deltas)
    save_file({key: tensor for key, tensor in tensors.items() if "_2" in key}, tmp_path / "a.safetensors")
    assert resolve(shapes, lora) == [("a.safetensors", "low")]
    with pytest.raises(RequestError, match="low-noise expert, given as high"):
        resolve(shapes, replace(lora, expert="high"))


# --- requests, records, runs -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x.safetensors", ("x.safetensors", 1.0, None)),
        ("x.safetensors:0.8", ("x.safetensors", 0.8, None)),
        (r"C:\x.safetensors:0.8", (r"C:\x.safetensors", 0.8, None)),
        (r"C:\x.safetensors", (r"C:\x.safetensors", 1.0, None)),
        ("C:/a b/x.safetensors:-1", ("C:/a b/x.safetensors", -1.0, None)),
        (r"\\server\x.safetensors:0", (r"\\server\x.safetensors", 0.0, None)),
        ("a:b.safetensors:.5", ("a:b.safetensors", 0.5, None)),
        ("pair:1:0", ("pair", 1.0, 0.0)),
    ],
)
def test_flag_values(text, expected):
    lora = Lora.parse(text)
    assert (lora.file, lora.strength, lora.lead_strength) == expected


def test_requests_round_trip_through_json():
    request = Request("x", seed=1, loras=(Lora("a.safetensors", 0.8, "high", 0.0, "0" * 64), Lora("b")), lead_steps=2)
    table = json.loads(json.dumps(request.to_dict()))
    assert Request.from_dict(table) == request
    assert digest(request.to_dict()) == digest(table)
    assert hash(request) == hash(Request.from_dict(table))
    for wrong in (5, [5], [{}], [{"file": "a", "weight": 1}], [{"file": "a", "strength": "much"}],
                  [{"file": "a", "expert": "middle"}], [{"file": ""}], [{"file": "a", "sha256": "b"}]):  # fmt: skip
        with pytest.raises(RequestError):
            Request.from_dict({"prompt": "x", "loras": wrong})


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    return folder


BARE = ["generate", "--ckpt_dir", str(TINY), "--size", "64x48", "--frames", "5", "--seed", "7", "--prompt", "A ball"]
TYPED = [*BARE, "--steps", "4", "--shift", "5"]
SMALL = Request("A ball", width=64, height=48, num_frames=5, num_steps=4, shift=5.0, solver="euler", seed=7)


def run(capsys, *words):
    code = cli.main([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


def test_generate_record_and_again(capsys, elsewhere, tmp_path, shapes):
    style = write(tmp_path / "there" / "style.safetensors", pairs(shapes))
    write(elsewhere / "loras" / "pair" / "high_noise_model.safetensors", pairs(shapes, ATTENTION))
    write(elsewhere / "loras" / "pair" / "low_noise_model.safetensors", pairs(shapes, ATTENTION))
    assert run(capsys, *TYPED, "--output", "plain.mp4")[0] == 0
    assert run(capsys, *TYPED, "--output", "zero.mp4", "--lora", f"{style}:0")[0] == 0
    code, _, err = run(capsys, *TYPED, "--output", "one.mp4", "--lora", f"{style}:0.8", "--lora", "pair")
    assert (code, "adapter style.safetensors, both experts, strength 0.8" in err) == (0, True)
    record = json.loads(run(capsys, "show", "one.mp4")[1])
    told = [(lora["file"], lora["strength"], lora["expert"]) for lora in record["request"]["loras"]]
    assert told == [("style.safetensors", 0.8, "both"), ("high_noise_model.safetensors", 1.0, "high"),
                    ("low_noise_model.safetensors", 1.0, "low")]  # fmt: skip
    assert all(len(lora["sha256"]) == 64 for lora in record["request"]["loras"])
    assert str(tmp_path) not in json.dumps(record)
    from wan22.video import read_frames

    plain, zero, one = (read_frames(f"{name}.mp4")[0] for name in ("plain", "zero", "one"))
    assert (plain == zero).all()
    assert not (plain == one).all()

    again = ["generate", "--from", "one.mp4", "--ckpt_dir", TINY]
    code, _, err = run(capsys, *again, "--output", "two.mp4")  # the pair is found in ./loras, the style nowhere
    assert (code, "style.safetensors" in err, record["request"]["loras"][0]["sha256"] in err) == (2, True, True)
    assert run(capsys, *again, "--output", "two.mp4", "--lora-dir", style.parent)[0] == 0
    assert Path("two.mp4").read_bytes() == Path("one.mp4").read_bytes()
    assert run(capsys, *again, "--output", "three.mp4", "--lora", f"{style}:0.8", "--lora", "pair")[0] == 0
    assert Path("three.mp4").read_bytes() == Path("one.mp4").read_bytes()

    write(style, pairs(shapes))  # another adapter of the same name
    code, _, err = run(capsys, *again, "--output", "four.mp4", "--lora-dir", style.parent)
    assert (code, "has another" in err) == (2, True)
    assert not Path("four.mp4").exists()


def latents_of(pipeline, request):
    return pipeline.denoise(pipeline.resolve(request), Reporter())


def test_loaded_once_or_again_is_the_same(tiny, tmp_path, shapes):
    loras = (Lora(str(write(tmp_path / "a.safetensors", pairs(shapes))), 0.5),)
    kept, dropped = (Pipeline(tiny, Precision("float32"), Placement("cpu", offload=o)) for o in ("none", "expert"))
    request = replace(SMALL, loras=loras)
    first, plain = latents_of(kept, request), latents_of(kept, SMALL)
    assert not torch.equal(first, plain)
    assert torch.equal(first, latents_of(kept, request))
    assert torch.equal(first, latents_of(dropped, request))
    assert torch.equal(plain, latents_of(dropped, SMALL))
    named = kept.resolve(request)
    assert named.loras[0].file == "a.safetensors"
    assert torch.equal(first, latents_of(kept, named))  # known by its hash, wherever it lies


# --- lightning and three-phase ---------------------------------------------------------------------------------------
PAIR = "Wan2.2-T2V-A14B-4steps-lora-rank64-Seko-V1.1"


@pytest.fixture(params=["loras", "cache"])
def lightning(request, elsewhere, tmp_path, shapes):
    """The pair where `wan22 download lightning` leaves it."""
    snapshot = tmp_path / "cache" / "hub" / "models--lightx2v--Wan2.2-Lightning" / "snapshots" / "abc"
    folder = (elsewhere / "loras" if request.param == "loras" else snapshot) / PAIR
    for name in ("high_noise_model", "low_noise_model"):
        write(folder / f"{name}.safetensors", pairs(shapes))
    return folder


def test_lightning_is_one_flag(capsys, lightning):
    code, out, err = run(capsys, *BARE, "--preset", "lightning", "--dry-run")
    assert code == 0, err
    assert "4 (euler, shift 5): 2 steps high noise, 2 low noise" in out
    assert "high_noise_model.safetensors, high noise, strength 1; low_noise_model.safetensors, low noise" in out
    assert run(capsys, *BARE, "--preset", "lightning", "--output", "v.mp4")[0] == 0
    assert len(json.loads(run(capsys, "show", "v.mp4")[1])["request"]["loras"]) == 2


def test_lightning_says_how_to_get_it(capsys, elsewhere):
    code, _, err = run(capsys, *TYPED, "--preset", "lightning")
    assert (code, PAIR in err, "wan22 download lightning" in err) == (2, True, True)


def test_three_phases_by_hand(tiny, lightning):
    """The preset's latents are those of its steps made one by one with plain and merged experts."""
    table = {**SMALL.to_dict(), **load_preset("three-phase").request}
    pipeline = Pipeline(tiny, Precision("float32"), Placement("cpu"))
    request = pipeline.resolve(Request.from_dict(table))
    steps = plan_steps(request)
    assert [round(step.timestep, 1) for step in steps] == [1000, 982.1, 961.5, 937.5, 833.3, 625]
    assert [step.expert for step in steps] == [HIGH] * 4 + [LOW] * 2
    assert [step.guidance for step in steps] == [4.0] * 3 + [1.0] * 3
    assert [[lora.strength for lora in step.loras] for step in steps] == [[0, 0]] * 3 + [[1, 1]] * 3
    assert [step.timestep for step in steps[3:]] == [s.timestep for s in plan_steps(replace(SMALL))[1:]]
    ours = pipeline.denoise(request, Reporter())

    merges = {side: pipeline.adapters.merges(side, request.loras) for side in ("high", "low")}
    models = [load_expert(tiny.experts[HIGH], torch.float32, CPU)] * 3
    models += [load_expert(tiny.experts[HIGH], torch.float32, CPU, merges["high"])]
    models += [load_expert(tiny.experts[LOW], torch.float32, CPU, merges["low"])] * 2
    prompt, negative = pipeline.encode([request.prompt, request.negative_prompt], Reporter())
    latents, solver = draw_noise(request, CPU), make_solver(request)
    with torch.inference_mode():
        for step, model in zip(steps, models, strict=True):
            contexts = [model.embed_context(text[None]) for text in (prompt, negative)]
            velocity = guided_velocity(model, latents, step, contexts[0], contexts[1] if step.guidance != 1 else None)
            latents = solver.step(velocity[None], solver.timesteps[step.index], latents[None], return_dict=False)[0][0]
    assert torch.equal(ours, latents)


def test_lead_steps(tiny):
    plain = plan_steps(SMALL)
    one = plan_steps(replace(SMALL, lead_steps=1, guidance_lead=2.0))
    assert [step.timestep for step in one] == [step.timestep for step in plain]
    assert [step.guidance for step in one] == [2.0, 4.0, 3.0, 3.0]
    with pytest.raises(RequestError, match="3 of them would be low noise"):
        plan_steps(replace(SMALL, shift=1.0, lead_steps=4))
    with pytest.raises(RequestError, match="--lead-steps"):
        replace(SMALL, lead_steps=5)
    # Guidance that begins only behind the lead is not lost.
    pipeline = Pipeline(tiny, Precision("float32"), Placement("cpu"))
    late = replace(SMALL, lead_steps=1, guidance_lead=1.0)
    assert not torch.equal(latents_of(pipeline, late), latents_of(pipeline, replace(late, guidance_high=1.0)))


# --- bad input -------------------------------------------------------------------------------------------------------
def truncated(path, shapes):
    path.write_bytes(write(path, pairs(shapes)).read_bytes()[:-100])
    return [path.name, "truncated"]


def cut_in_its_header(path, shapes):
    path.write_bytes(write(path, pairs(shapes)).read_bytes()[:200])
    return [path.name, "truncated"]


def no_safetensors(path, shapes):
    path.write_text("<!doctype html><title>Log in</title>")
    return [path.name, "not a safetensors file"]


def empty(path, shapes):
    path.write_bytes(b"")
    return [path.name, "not a safetensors file"]


def lfs_pointer(path, shapes):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 613516752\n")
    return [path.name, "Git LFS pointer", "git lfs pull"]


def without_tensors(path, shapes):
    save_file({}, path)
    return [path.name, "no tensors"]


def of_another_kind(path, shapes):
    save_file({f"lora_unet_blocks_0_self_attn_q.{part}": random(4, 4) for part in ("lokr_w1", "lokr_w2")}, path)
    return [path.name, "matched 0 of 2 tensors", "lokr_w1", "LoKr"]


def half_matching(path, shapes):
    write(path, pairs(shapes, ATTENTION), extra={"diffusion_model.blocks.7.self_attn.q.diff_b": random(4)}.items())
    return [path.name, "matched 72 of 73 tensors", "blocks.7.self_attn.q.diff_b"]


def of_another_network(path, shapes):
    save_file({"lora_unet_down_blocks_0_attn1_to_q.lora_down.weight": random(4, 4)}, path)
    return [path.name, "matched 0 of 1 tensors", "lora_unet_down_blocks_0"]


def of_an_image_model_alone(path, shapes):
    save_file({"diffusion_model.img_emb.proj.1.diff_b": random(4)}, path)
    return [path.name, "matched 0 of 1 tensors", "image-to-video"]


def of_another_width(path, shapes):
    save_file({"blocks.0.ffn.0.lora_down.weight": random(4, 96), "blocks.0.ffn.0.lora_up.weight": random(384, 4)}, path)
    return [path.name, "another model", "[384, 96]", "[256, 128]", "blocks.0.ffn.0"]


def difference_of_another_width(path, shapes):
    save_file({"blocks.0.diff_m": random(1, 6, 96)}, path)
    return [path.name, "another model", "[1, 6, 96]", "[1, 6, 128]"]


def of_more_channels(path, shapes):
    save_file({"patch_embedding.lora_down.weight": random(4, 36, 1, 2, 2),
               "patch_embedding.lora_up.weight": random(128, 4, 1, 1, 1)}, path)  # fmt: skip
    return [path.name, "another model", "[128, 36, 1, 2, 2]", "[128, 16, 1, 2, 2]"]


def half_a_pair(path, shapes):
    save_file({"blocks.0.ffn.0.lora_down.weight": random(4, 128)}, path)
    return [path.name, "blocks.0.ffn.0.lora_down.weight", "without its lora_up"]


def alpha_alone(path, shapes):
    save_file({"blocks.0.ffn.0.alpha": torch.tensor(1.0)}, path)
    return [path.name, "alpha", "lora_down and lora_up"]


def unequal_ranks(path, shapes):
    save_file({"blocks.0.ffn.0.lora_A.weight": random(4, 128), "blocks.0.ffn.0.lora_B.weight": random(256, 8)}, path)
    return [path.name, "[256, 8]", "[4, 128]", "no pair"]


def said_twice(path, shapes):
    save_file({"blocks.0.ffn.0.diff_b": random(256), "diffusion_model.blocks.0.ffn.0.diff_b": random(256)}, path)
    return [path.name, "twice"]


def of_whole_numbers(path, shapes):
    save_file({"blocks.0.ffn.0.diff_b": torch.zeros(256, dtype=torch.int8)}, path)
    return [path.name, "I8"]


def dora(path, shapes):
    write(path, pairs(shapes), "diffusers", metadata={"lora_adapter_metadata": '{"transformer.use_dora": true}'})
    return [path.name, "use_dora"]


def broken_metadata(path, shapes):
    write(path, pairs(shapes), "diffusers", metadata={"lora_adapter_metadata": "{"})
    return [path.name, "metadata"]


BREAKAGES = [
    truncated, cut_in_its_header, no_safetensors, empty, lfs_pointer, without_tensors, of_another_kind, half_matching,
    of_another_network, of_an_image_model_alone, of_another_width, difference_of_another_width, of_more_channels,
    half_a_pair, alpha_alone, unequal_ranks, said_twice, of_whole_numbers, dora, broken_metadata,
]  # fmt: skip


@pytest.fixture
def unread(monkeypatch):
    """No way to read a weight."""

    def read(*args):
        raise AssertionError("a weight was read")

    monkeypatch.setattr("wan22.files.tensor_files.Safetensors.read", read)
    monkeypatch.setattr("wan22.files.tensor_files.Pickle.read", read)


def refused(capsys, words, *expected):
    """One error line that holds all that is expected, exit 2, nothing written."""
    before = sorted(Path().rglob("*"))
    code, out, err = run(capsys, *TYPED, *words)
    assert (code, out) == (2, "")
    assert [line.partition(":")[0] for line in err.splitlines()] in (["error"], ["error", "hint"]), err
    for text in expected:
        assert text in err, err
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize("breakage", BREAKAGES, ids=lambda breakage: breakage.__name__)
def test_broken_adapters(capsys, elsewhere, unread, shapes, breakage):
    expected = breakage(elsewhere / "a.safetensors", shapes)
    refused(capsys, ["--lora", "a.safetensors"], *expected)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--lora", "nowhere.safetensors"], ["--lora nowhere.safetensors", "no such file", "loras"]),
        (["--lora", ""], ["--lora", "empty"]),
        (["--lora", "x" * 5000], ["no such file"]),
        (["--lora", "good.safetensors:strong"], ["'strong' is not a strength"]),
        (["--lora", "good.safetensors:nan"], ["'nan' is not a strength"]),
        (["--lora", "good.safetensors:1e9"], ["'1e9' is not a strength"]),
        (["--lora", "good.safetensors:1000"], ["strength", "1000"]),
        (["--lora", "good.safetensors:1:0"], ["good.safetensors", "without lead steps"]),
        (["--lora", "good.safetensors", "--guidance-lead", "2"], ["--guidance-lead"]),
        (["--lora", "old.pth"], ["old.pth", "pickle", "safetensors"]),
        (["--lora", "folder"], ["folder", "neither one adapter nor a pair", "3 .safetensors files"]),
        (["--lora", "void"], ["void", "0 .safetensors files"]),
        (["--lora-high", "folder/a_low_noise.safetensors"], ["a_low_noise", "given as high", "--lora-low"]),
        (["--lora-low", "folder/a_high_noise.safetensors"], ["a_high_noise", "given as low", "--lora-high"]),
        (["--lora-dir", "nowhere"], ["--lora-dir nowhere"]),
        (["--lead-steps", "-1"], ["--lead-steps"]),
        (["--lead-steps", "9"], ["--lead-steps", "outside 0 to 4"]),
        (["--lead-steps", "4", "--dry-run"], ["--lead-steps 4", "low noise"]),
        (["--guidance-lead", "inf", "--lead-steps", "1"], ["--guidance-lead"]),
    ],
)
def test_flags(capsys, elsewhere, unread, shapes, flags, expected):
    made = pairs(shapes, ATTENTION[:1])
    for name in ("good", "folder/a_high_noise", "folder/a_low_noise", "folder/b"):
        write(elsewhere / f"{name}.safetensors", made)
    (elsewhere / "void").mkdir()
    torch.save({"blocks.0.self_attn.q.diff": torch.zeros(4)}, elsewhere / "old.pth")
    refused(capsys, flags, *expected)


def test_a_file_replaced_since_it_was_checked(tmp_path, shapes):
    path = write(tmp_path / "a.safetensors", pairs(shapes))
    adapters = Adapters(shapes, [], Path("no-cache"))
    resolved = adapters.resolve([Lora(str(path))])
    assert len(adapters.merges("high", resolved)) == 1
    write(path, pairs(shapes, ATTENTION))
    with pytest.raises(RequestError, match="replaced"):
        adapters.merges("high", resolved)
    with pytest.raises(RequestError, match="is wanted"):
        adapters.resolve(resolved)


def test_the_wrong_checkpoint_is_told_by_the_adapter_too(tmp_path, shapes):
    wide = {name: tuple(5120 if n == 128 else n for n in shape) for name, shape in shapes.items()}
    path = write(tmp_path / "a.safetensors", pairs(shapes))
    with pytest.raises(RequestError, match=r"another model: .* changes \[128, 128\], here .* is \[5120, 5120\]"):
        open_adapter(path, wide)
