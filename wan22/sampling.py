"""Timesteps, guidance and the loop. The solvers are diffusers' classes, given the reference's own schedule.

Legend: C T H W latents, S steps; timesteps run from 1000 (noise) to 0, sigma = timestep / 1000.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from wan22.config import Request
from wan22.model import ContextKV, WanTransformer


class Experts(Protocol):
    """Whatever hands out the two transformers by name."""

    def get(self, name: str) -> WanTransformer: ...


@dataclass(frozen=True)
class Step:
    """One step of a run, as decided before it starts."""

    index: int
    timestep: float
    expert: str
    guidance: float


def make_solver(request: Request) -> Any:
    """A diffusers scheduler that steps through the reference's own timesteps and sigmas.

    The classes' own schedules differ in the last places or shift twice, so both are assigned. The published UniPC
    starts at 0.999 and DPM++ at 1; both truncate timesteps to whole numbers. Euler is the schedule of the
    step-distilled models: from 1, not truncated. Source: the published `fm_solvers_unipc.py`, `fm_solvers.py`.
    """
    from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    steps, train = request.num_steps, request.spec.num_train_timesteps
    solver: Any
    if request.solver == "euler":
        solver = FlowMatchEulerDiscreteScheduler(num_train_timesteps=train)
    elif request.solver == "unipc":
        solver = UniPCMultistepScheduler(
            num_train_timesteps=train, prediction_type="flow_prediction", use_flow_sigmas=True
        )
    else:
        solver = DPMSolverMultistepScheduler(
            num_train_timesteps=train, prediction_type="flow_prediction", use_flow_sigmas=True
        )
    solver.set_timesteps(steps)
    start = 1 - 1 / train if request.solver == "unipc" else 1.0
    sigmas = np.linspace(start, 0, steps + 1)[:-1]
    sigmas = request.shift * sigmas / (1 + (request.shift - 1) * sigmas)
    timesteps = torch.from_numpy(sigmas * train)
    solver.timesteps = timesteps.float() if request.solver == "euler" else timesteps.to(torch.int64)
    solver.sigmas = torch.from_numpy(np.append(sigmas, 0.0)).float()
    return solver


def plan_steps(request: Request) -> list[Step]:
    """Which expert works at which timestep: the high-noise one where the shifted timestep is at the boundary or above."""
    high, low = request.spec.experts
    boundary = request.boundary * request.spec.num_train_timesteps
    return [
        Step(index, float(t), *((high, request.guidance_high) if t >= boundary else (low, request.guidance_low)))
        for index, t in enumerate(make_solver(request).timesteps)
    ]


def describe_split(steps: Sequence[Step], experts: tuple[str, str]) -> str:
    """"26 steps high noise, 14 low noise"."""
    high = sum(step.expert == experts[0] for step in steps)
    return f"{high} step{'s' * (high != 1)} high noise, {len(steps) - high} low noise"


def draw_noise(request: Request, device: torch.device) -> Tensor:
    """The starting latents [C, T, H, W] float32, by a generator on `request.noise_device`, moved to `device`.

    On a CPU (the default) a seed is the same noise on every machine; on `cuda` it is the published code's.
    """
    generator = torch.Generator(request.noise_device).manual_seed(request.seed or 0)
    noise = torch.randn(
        request.latent_shape, generator=generator, device=request.noise_device, dtype=torch.float32
    )
    return noise.to(device)


def guided_velocity(
    model: WanTransformer, latents: Tensor, step: Step, context: ContextKV, negative: ContextKV | None
) -> Tensor:
    """uncond + guidance · (cond − uncond) in float32; [C, T, H, W] → [C, T, H, W].

    Without `negative` the conditional velocity alone, which is what guidance 1 means. Source: Ho and Salimans,
    "Classifier-Free Diffusion Guidance" (2022), in the published form.
    """
    timestep = torch.tensor([step.timestep], device=latents.device)
    conditional = model(latents[None], timestep, context)[0]
    if negative is None:
        return conditional
    unconditional = model(latents[None], timestep, negative)[0]
    return unconditional + step.guidance * (conditional - unconditional)


@torch.inference_mode()
def denoise(
    request: Request,
    experts: Experts,
    noise: Tensor,
    context: Tensor,
    negative_context: Tensor | None,
    on_step: Callable[[Step], None] = lambda step: None,
) -> Tensor:
    """Integrate from noise to latents, [C, T, H, W] float32 both.

    context, negative_context: [M, text_dim], unpadded; the negative one may be None where no step's guidance needs it.
    `on_step` is called after each step. An expert is asked for at its first step, its prompt keys and values are made
    then, once; the other's are dropped.
    """
    solver, latents, working = make_solver(request), noise, ""
    model: Any = None
    prompt: ContextKV | None = None
    negative: ContextKV | None = None
    for step in plan_steps(request):
        if step.expert != working:
            model = prompt = negative = None  # let go first: there may be no room for two
            model, working = experts.get(step.expert), step.expert
            prompt = model.embed_context(context[None])
            if step.guidance != 1 and negative_context is not None:
                negative = model.embed_context(negative_context[None])
        velocity = guided_velocity(model, latents, step, prompt, negative)
        latents = solver.step(velocity[None], solver.timesteps[step.index], latents[None], return_dict=False)[0][0]
        on_step(step)
    return latents
