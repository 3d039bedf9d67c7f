"""Which expert works when, what guidance costs, and what a seed is."""

from dataclasses import replace

import pytest
import torch

from wan22.config import Request, RequestError
from wan22.sampling import denoise, describe_split, draw_noise, guided_velocity, make_solver, plan_steps

EXPERTS = ("high_noise_model", "low_noise_model")


@pytest.mark.parametrize(
    ("steps", "shift", "solver", "split"),
    [(40, 12, "unipc", (26, 14)), (50, 12, "unipc", (32, 18)), (50, 5, "unipc", (21, 29)), (20, 12, "unipc", (13, 7)),
     (20, 8, "unipc", (11, 9)), (20, 5, "unipc", (9, 11)), (4, 5, "euler", (2, 2)), (4, 3, "euler", (2, 2))],
)  # fmt: skip
def test_published_splits(steps, shift, solver, split):
    """The published recipe's own table."""
    plan = plan_steps(Request("x", num_steps=steps, shift=float(shift), solver=solver))
    assert describe_split(plan, EXPERTS) == f"{split[0]} steps high noise, {split[1]} low noise"
    assert [step.expert for step in plan] == [EXPERTS[0]] * split[0] + [EXPERTS[1]] * split[1]


def test_euler_is_the_distilled_schedule():
    solver = make_solver(Request("x", num_steps=4, shift=5.0, solver="euler"))
    assert torch.allclose(solver.timesteps, torch.tensor([1000, 937.5, 2500 / 3, 625]))
    assert torch.allclose(solver.sigmas, torch.tensor([1, 0.9375, 2.5 / 3, 0.625, 0]))


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
def test_many_small_steps(solver):
    """The first timesteps are the same whole number then; none is passed over for it."""
    request = Request("x", num_steps=200, solver=solver)
    made, latents = make_solver(request), torch.ones(1, 4, 1, 2, 2)
    assert solver != "unipc" or made.timesteps[0] == made.timesteps[1]
    for timestep in made.timesteps:  # the velocity of a straight way from 1 to 0
        latents = made.step(torch.ones_like(latents), timestep, latents, return_dict=False)[0]
    assert torch.allclose(latents, 1 - made.sigmas[0].expand_as(latents), atol=1e-3)


class CountingModel:
    """Velocity = context value · latents; counts its calls."""

    def __init__(self, log, name):
        self.log, self.name = log, name

    def embed_context(self, context):
        self.log.append((self.name, "embed"))
        return context

    def __call__(self, latents, timestep, context):
        self.log.append((self.name, timestep.item()))
        return latents * context.mean()


class CountingExperts:
    def __init__(self):
        self.log = []

    def get(self, name, loras):
        self.log.append(("get", name))
        return CountingModel(self.log, name)

    def expect(self, name, loras):
        pass


SMALL = Request("x", width=64, height=64, num_frames=5, num_steps=20, shift=5.0, seed=1)
ONES, TWOS = torch.ones(3, 8), torch.full((3, 8), 2.0)


def test_guidance_is_per_expert_and_free_at_one():
    experts = CountingExperts()
    request = replace(SMALL, guidance_high=4.0, guidance_low=1.0)
    denoise(request, experts, draw_noise(request, torch.device("cpu")), ONES, TWOS)
    calls = [name for name, what in experts.log if isinstance(what, float)]
    assert calls == [EXPERTS[0]] * 18 + [EXPERTS[1]] * 11  # nine guided steps of two passes, eleven of one
    embeds = [entry for entry in experts.log if entry[1] == "embed"]
    assert embeds == [(EXPERTS[0], "embed")] * 2 + [(EXPERTS[1], "embed")]
    assert [name for what, name in experts.log if what == "get"] == list(EXPERTS)


def test_guidance_on_part_of_the_steps():
    experts, request = CountingExperts(), replace(SMALL, guidance_start=0.1, guidance_stop=0.8)
    steps = plan_steps(request)
    assert [step.guidance for step in steps] == [1.0] * 2 + [4.0] * 7 + [3.0] * 7 + [1.0] * 4
    denoise(request, experts, draw_noise(request, torch.device("cpu")), ONES, TWOS)
    assert sum(isinstance(what, float) for _, what in experts.log) == 20 + 14
    assert plan_steps(replace(SMALL, guidance_start=0.0, guidance_stop=1.0)) == plan_steps(SMALL)
    for start, stop in ((0.5, 0.5), (-0.1, 1.0), (0.0, 1.1)):
        with pytest.raises(RequestError, match=r"--guidance-st(art|op)"):
            replace(SMALL, guidance_start=start, guidance_stop=stop)


def test_guided_velocity_formula():
    model, latents, step = CountingModel([], "m"), torch.randn(2, 1, 2, 2), plan_steps(SMALL)[0]
    expected = 2 * latents + step.guidance * (latents - 2 * latents)
    assert torch.allclose(guided_velocity(model, latents, step, ONES, TWOS), expected)
    assert torch.equal(guided_velocity(model, latents, step, ONES, None), latents)


def test_steps_are_told_in_order():
    seen = []
    denoise(SMALL, CountingExperts(), draw_noise(SMALL, torch.device("cpu")), ONES, TWOS, seen.append)
    assert [step.index for step in seen] == list(range(20))
    assert [step.guidance for step in seen] == [4.0] * 9 + [3.0] * 11


def test_a_seed_is_the_same_noise_everywhere():
    cpu = torch.device("cpu")
    assert torch.equal(draw_noise(SMALL, cpu), draw_noise(SMALL, cpu))
    assert not torch.equal(draw_noise(SMALL, cpu), draw_noise(replace(SMALL, seed=2), cpu))
    assert draw_noise(SMALL, cpu).shape == SMALL.latent_shape == (16, 2, 8, 8)
