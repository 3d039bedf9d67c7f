"""Timesteps, guidance and the loop. The solvers are diffusers' classes, given the reference's own schedule.

Legend: C T H W latents, S steps; timesteps run from 1000 (noise) to 0, sigma = timestep / 1000.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from wan22.config import Lora, Request, RequestError, Residency, RunError
from wan22.model import ContextKV, WanTransformer
from wan22.residency.memory import OUT_OF_MEMORY
from wan22.state import Progress
from wan22.step_cache import MOST_SKIPPED, StepCache, always_computed


class Experts(Protocol):
    """Whatever hands out the two transformers by name."""

    def get(self, name: str, loras: Sequence[Lora]) -> WanTransformer: ...

    def expect(self, name: str, loras: Sequence[Lora]) -> None:
        """This one is next."""

    def shrink(self) -> Residency | None:
        """Make do with less memory from now on, if that is possible."""


@dataclass(frozen=True)
class Step:
    """One step of a run, as decided before it starts."""

    index: int
    timestep: float
    expert: str
    guidance: float
    loras: tuple[Lora, ...]  # with their strengths at this step


def make_solver(request: Request) -> Any:
    """A diffusers scheduler that steps through the reference's own timesteps and sigmas.

    The classes' own schedules differ in the last places or shift twice, so both are assigned. The published UniPC
    starts at 0.999 and DPM++ at 1; both truncate timesteps to whole numbers. Euler is the schedule of the
    step-distilled models: from 1, not truncated. Source: the published `fm_solvers_unipc.py`, `fm_solvers.py`.
    """
    from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    train = request.spec.num_train_timesteps
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
    solver.set_timesteps(request.num_steps)
    start = 1 - 1 / train if request.solver == "unipc" else 1.0
    lead = max(request.lead_steps, 1)
    grid = np.linspace(start, 0, request.num_steps - lead + 2)
    sigmas = np.append(np.linspace(grid[0], grid[1], lead, endpoint=False), grid[1:-1])  # the lead shares a first step
    sigmas = request.shift * sigmas / (1 + (request.shift - 1) * sigmas)
    timesteps = torch.from_numpy(sigmas * train)
    solver.timesteps = timesteps.float() if request.solver == "euler" else timesteps.to(torch.int64)
    solver.sigmas = torch.from_numpy(np.append(sigmas, 0.0)).float()
    solver.set_begin_index(0)  # not looked for by its timestep: the first two are the same number in many small steps
    return solver


# What the three schedulers change in themselves while they step; a test compares this with what they do.
SOLVER_MEMORY = ("model_outputs", "timestep_list", "last_sample", "lower_order_nums", "this_order", "_step_index")


def remember(solver: Any) -> dict[str, Any]:
    """A scheduler's memory: tensors, whole numbers, None, and lists of these. Nothing is copied but the lists, which
    the schedulers shift in place; the tensors they replace."""
    memory = {name: getattr(solver, name) for name in SOLVER_MEMORY if hasattr(solver, name)}
    return {name: list(value) if isinstance(value, list) else value for name, value in memory.items()}


def remind(solver: Any, memory: dict[str, Any], device: torch.device) -> None:
    """Give a new scheduler another one's memory; latents go to `device`, timesteps (no dimensions) stay on the CPU."""

    def place(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) and value.ndim else value

    for name, value in memory.items():
        setattr(solver, name, [place(item) for item in value] if isinstance(value, list) else place(value))


def plan_steps(request: Request) -> list[Step]:
    """Which expert works at which timestep: the high-noise one where the shifted timestep is at the boundary or above.
    Raises RequestError where lead steps would not be the high-noise expert's."""
    high, low = request.spec.experts
    boundary = request.spec.boundary if request.boundary is None else request.boundary
    boundary *= request.spec.num_train_timesteps
    steps = [
        Step(index, float(t), *((high, request.guidance_high) if t >= boundary else (low, request.guidance_low)),
             request.loras)
        for index, t in enumerate(make_solver(request).timesteps)
    ]  # fmt: skip
    if late := sum(step.expert != high for step in steps[: request.lead_steps]):
        raise RequestError(f"--lead-steps {request.lead_steps}: {late} of them would be low noise",
                           hint="more --steps, a higher --shift, or fewer lead steps")  # fmt: skip
    loras = first_loras(request)
    lead = [replace(step, guidance=request.guidance_lead, loras=loras) for step in steps[: request.lead_steps]]
    steps = lead + steps[request.lead_steps :]
    start, stop = request.guidance_start * request.num_steps, request.guidance_stop * request.num_steps
    return [step if start <= step.index < stop else replace(step, guidance=1.0) for step in steps]


def evaluations(steps: Sequence[Step]) -> int:
    """Forwards of a whole run: two a guided step."""
    return sum(1 if step.guidance == 1 else 2 for step in steps)


def first_loras(request: Request) -> tuple[Lora, ...]:
    """The adapters with their strengths at the first step."""
    if not request.lead_steps:
        return request.loras
    return tuple(
        lora if lora.lead_strength is None else replace(lora, strength=lora.lead_strength) for lora in request.loras
    )


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


class Evaluate(Protocol):
    """How both branches of a step are computed: latents [1, C, T, H, W] and timestep [1] → the velocity of the prompt
    and, where there is a negative one, of that. One after the other here; on several devices parallel.py's."""

    def __call__(
        self, model: WanTransformer, latents: Tensor, timestep: Tensor, context: ContextKV, negative: ContextKV | None
    ) -> tuple[Tensor, Tensor | None]: ...


def evaluate(
    model: WanTransformer, latents: Tensor, timestep: Tensor, context: ContextKV, negative: ContextKV | None
) -> tuple[Tensor, Tensor | None]:
    conditional = model(latents, timestep, context)
    return conditional, None if negative is None else model(latents, timestep, negative)


def guided_velocity(
    model: WanTransformer, latents: Tensor, step: Step, context: ContextKV, negative: ContextKV | None,
    evaluate: Evaluate = evaluate,
) -> Tensor:  # fmt: skip
    """uncond + guidance · (cond − uncond) in float32; [C, T, H, W] → [C, T, H, W].

    Without `negative` the conditional velocity alone, which is what guidance 1 means. Source: Ho and Salimans,
    "Classifier-Free Diffusion Guidance" (2022), in the published form.
    """
    timestep = torch.tensor([step.timestep], device=latents.device)
    conditional, unconditional = evaluate(model, latents[None], timestep, context, negative)
    if unconditional is None:
        return conditional[0]
    return unconditional[0] + step.guidance * (conditional[0] - unconditional[0])


def _work(step: Step) -> tuple[Any, ...]:
    """What an expert is asked for with, and its prompts are made for."""
    return step.expert, step.loras, step.guidance != 1


@torch.inference_mode()
def denoise(
    request: Request,
    experts: Experts,
    noise: Tensor,
    context: Tensor,
    negative_context: Tensor | None,
    on_step: Callable[[Step], None] = lambda step: None,
    begun: Progress | None = None,
    keep: Callable[[Progress], None] = lambda progress: None,
    warn: Callable[[str], None] = lambda text: None,
    cache: StepCache | None = None,
    look: Callable[[Callable[[], Tensor]], None] = lambda clean: None,
    evaluate: Evaluate = evaluate,
) -> Tensor:
    """Integrate from noise to latents, [C, T, H, W] float32 both.

    context, negative_context: [M, text_dim], unpadded; the negative one may be None where no step's guidance needs it.
    `on_step` is called after each step. An expert is asked for at its first step and where its adapters or the need
    for guidance change; its prompt keys and values are made then, once; the others' are dropped. `begun` goes on from
    there instead of the noise; `keep` is given what it takes to do so, after each step, and `look` what makes the clean
    latents that the step was heading for. Where memory runs out, the step is taken again with the experts' next smaller
    residency, which `warn` is told. Raises RunError where there is none.

    cache: of this run alone; it is emptied where an expert is asked for. What it remembers is large, and is no part of
    the progress: that keeps the latents of the last two steps that were computed, which are computed again to fill it.
    """
    cache = cache or StepCache(0)
    try:
        return _denoise(
            request, experts, noise, context, negative_context, on_step, begun, keep, warn, cache, look, evaluate
        )
    finally:
        cache.detach()


def _denoise(
    request: Request, experts: Experts, noise: Tensor, context: Tensor, negative_context: Tensor | None,
    on_step: Callable[[Step], None], begun: Progress | None, keep: Callable[[Progress], None],
    warn: Callable[[str], None], cache: StepCache, look: Callable[[Callable[[], Tensor]], None], evaluate: Evaluate,
) -> Tensor:  # fmt: skip
    solver, latents = make_solver(request), noise
    computed: tuple[tuple[int, Tensor], ...] = ()  # the last two steps that were not skipped, and their latents
    if begun:
        latents = begun.latents.to(noise.device)
        remind(solver, begun.solver, noise.device)
        computed = tuple((index, at.to(noise.device)) for index, at in begun.computed)
    working: tuple[Any, ...] = ()
    model: Any = None
    prompt: Any = None
    negative: ContextKV | None = None
    steps = plan_steps(request)
    todo, always = steps[begun.done if begun else 0 :], always_computed([step.expert for step in steps])
    while todo:
        step, before, trouble = todo[0], remember(solver), ""
        velocity: Any = None
        try:
            if _work(step) != working:
                cache.detach()
                model = prompt = negative = None  # let go first: there may be no room for two
                model = experts.get(step.expert, step.loras)
                working = _work(step)
                prompt = model.embed_context(context[None])
                if step.guidance != 1 and negative_context is not None:
                    negative = model.embed_context(negative_context[None])
                if later := next((at for at in todo if (at.expert, at.loras) != (step.expert, step.loras)), None):
                    experts.expect(later.expert, later.loras)
                cache.attach(model)
                for index, at in computed:
                    if _work(steps[index]) == working:  # in the middle of its turn: as it was
                        cache.begin_step(index, may_skip=False)
                        guided_velocity(model, at, steps[index], prompt, negative, evaluate)
            last = computed[-1][0] if computed else step.index
            cache.begin_step(step.index, may_skip=step.index not in always and step.index - last <= MOST_SKIPPED)
            velocity = guided_velocity(model, latents, step, prompt, negative, evaluate)
            after = solver.step(velocity[None], solver.timesteps[step.index], latents[None], return_dict=False)[0][0]
            if cache.end_step():
                computed = (*computed[-1:], (step.index, latents))
            noisy, latents = latents, after
        except OUT_OF_MEMORY as error:
            trouble = str(error).partition(". ")[0] or "no more is known"
        if trouble:  # not inside `except`: the error holds on to all that was at work
            cache.detach()
            model = prompt = negative = velocity = None
            working = ()
            remind(solver, before, noise.device)
            if not (smaller := experts.shrink()):
                raise RunError(f"out of memory in step {step.index + 1}, with the smallest placement: {trouble}",
                               hint="a smaller --size or fewer --frames")  # fmt: skip
            warn(f"out of memory in step {step.index + 1}: going on from there with --offload {smaller.kind}")
            continue
        todo = todo[1:]
        keep(Progress(step.index + 1, latents, remember(solver), computed if cache.threshold else ()))
        on_step(step)
        look(functools.partial(clean, noisy, velocity, float(solver.sigmas[step.index])))
    return latents


def clean(noisy: Tensor, velocity: Tensor, sigma: float) -> Tensor:
    """Where a straight way from these latents ends: x − sigma · v, as x = (1 − sigma) · clean + sigma · noise and
    v = noise − clean."""
    return noisy - sigma * velocity
