"""The published code's own numbers, met in float32 on the CPU. Tolerances are absolute; rounding is what is left."""

import json

import pytest
import torch
from conftest import GOLDEN
from safetensors.torch import load_file

from wan22.config import Request
from wan22.load import load_expert
from wan22.pipeline import Pipeline
from wan22.report import Reporter
from wan22.sampling import draw_noise, make_solver
from wan22.text_encoder import TextEncoder, Tokenizer
from wan22.vae import VideoVAE

CPU = torch.device("cpu")
EXPERTS = ("high_noise_model", "low_noise_model")
PROMPTS = json.loads((GOLDEN / "prompts.json").read_text())
GENERATIONS = json.loads((GOLDEN / "pipeline.json").read_text())


def largest_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    difference = (ours - theirs).abs()
    print(f"largest {difference.max():.2e}, mean {difference.mean():.2e}")
    return difference.max().item()


def golden_request(case: dict) -> Request:
    return Request(
        case["prompt"], case["negative_prompt"], width=case["width"], height=case["height"], num_frames=case["frames"],
        num_steps=case["steps"], shift=case["shift"], solver=case["solver"], boundary=case["boundary"],
        guidance_high=case["guidance_high_noise"], guidance_low=case["guidance_low_noise"], seed=case["seed"],
    )  # fmt: skip


@pytest.fixture(scope="module")
def models(tiny):
    return {name: load_expert(expert, torch.float32, CPU) for name, expert in tiny.experts.items()}


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("case", range(4))
def test_velocity(models, name, case):
    data, model = load_file(GOLDEN / "dit.safetensors"), models[name]
    with torch.inference_mode():
        context = model.embed_context(data[f"{case}.context"][None])
        velocity = model(data[f"{case}.latents"][None], data[f"{case}.timestep"], context)[0]
    assert largest_difference(velocity, data[f"{case}.{name}.velocity"]) < 2e-5


@pytest.mark.parametrize("name", EXPERTS)
def test_velocity_against_diffusers(models, tiny, name):
    """A second oracle: diffusers' transformer with the same weights, sample by sample and as a batch."""
    from diffusers import WanTransformer3DModel
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    data, model = load_file(GOLDEN / "dit.safetensors"), models[name]
    config = model.config
    theirs = WanTransformer3DModel(
        num_attention_heads=config.num_heads, attention_head_dim=config.head_dim, text_dim=config.text_dim,
        freq_dim=config.freq_dim, ffn_dim=config.ffn_dim, num_layers=config.num_layers,
    ).eval()  # fmt: skip
    theirs.load_state_dict(convert_wan_transformer_to_diffusers(dict(model.state_dict())), strict=True)
    latents = torch.stack([data["0.latents"], data["1.latents"]])
    timestep = torch.cat([data["0.timestep"], data["1.timestep"]])
    contexts = torch.zeros(2, 512, config.text_dim)
    for i in range(2):
        contexts[i, : len(data[f"{i}.context"])] = data[f"{i}.context"]
    with torch.inference_mode():
        expected = theirs(latents, timestep, contexts, return_dict=False)[0]
        # diffusers computes the timestep's sinusoid in float32, which alone costs 2.8e-5 against the published code.
        assert largest_difference(model(latents, timestep, model.embed_context(contexts)), expected) < 6e-5


@pytest.fixture(scope="module")
def text_encoder(tiny):
    return TextEncoder(tiny, torch.float32, CPU)


@pytest.mark.parametrize("case", range(len(PROMPTS)))
def test_text(tiny, text_encoder, case):
    data = load_file(GOLDEN / "text.safetensors")
    ids, cut = Tokenizer(tiny.tokenizer, 512)(PROMPTS[case])
    assert ids == data[f"{case}.ids"].tolist()
    assert cut == (case == 4)
    assert largest_difference(text_encoder(ids), data[f"{case}.context"]) < 2e-5


def test_vae(tiny):
    data, vae = load_file(GOLDEN / "vae.safetensors"), VideoVAE(tiny, CPU)
    chunks = list(vae.decode(data["latents"]))
    assert [len(chunk) for chunk in chunks] == [1, 4, 4]
    assert largest_difference(torch.cat(chunks).transpose(0, 1), data["decoded"]) < 2e-5
    assert largest_difference(vae.encode(data["frames"]), data["encoded"]) < 2e-5


SAMPLER_CASES = [(solver, *case) for solver in ("unipc", "dpm++") for case in ((20, 5), (4, 5), (40, 12), (50, 5))]


@pytest.mark.parametrize(("solver", "steps", "shift"), SAMPLER_CASES)
def test_sampler(solver, steps, shift):
    data = load_file(GOLDEN / "sampler.safetensors")
    golden = {name: data[f"{solver}.{steps}.{shift}.{name}"] for name in ("timesteps", "sigmas", "noise", "final")}
    ours = make_solver(Request("x", solver=solver, num_steps=steps, shift=float(shift)))
    assert torch.equal(ours.timesteps.float(), golden["timesteps"])
    assert largest_difference(ours.sigmas, golden["sigmas"]) < 1e-7
    x = golden["noise"]
    for t in ours.timesteps:
        velocity = x * torch.cos(t / 300) - torch.tanh(x**3) + t / 1000
        x = ours.step(velocity, t, x, return_dict=False)[0]
    assert largest_difference(x, golden["final"]) < 1e-5


@pytest.fixture(scope="module")
def pipeline(tiny):
    return Pipeline(tiny)


@pytest.mark.parametrize("case", range(len(GENERATIONS)))
def test_generation(pipeline, case):
    data, request = load_file(GOLDEN / "pipeline.safetensors"), golden_request(GENERATIONS[case])
    assert torch.equal(draw_noise(request, CPU), data[f"{case}.noise"])
    latents = pipeline.denoise(request, Reporter())
    assert largest_difference(latents, data[f"{case}.latents"]) < 1e-4
    video = pipeline.decode(latents)
    expected = ((data[f"{case}.video"] + 1) / 2 * 255).permute(1, 2, 3, 0)
    assert max(abs(torch.from_numpy(chunk).float() - expected[at]).max() for chunk, at in zip(
        video, (slice(0, 1), slice(1, 5), slice(5, 9)), strict=True)) < 1.01  # fmt: skip


def test_published_negative_prompt():
    assert {case["negative_prompt"] for case in GENERATIONS} == {Request("x").negative_prompt}
