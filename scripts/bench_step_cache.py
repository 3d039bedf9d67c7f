"""What the step cache costs and spares, beside cache-dit's, on the demo model: whole runs, on any machine.

    python scripts/bench_step_cache.py                               # ours, at several thresholds
    python scripts/bench_step_cache.py --thresholds 0.1 --prompts 1
    pip install --no-deps cache-dit==1.5.3
    python scripts/bench_step_cache.py --against cache-dit           # and theirs, around diffusers' transformer

Error: latents' relative error to the run that skips nothing, mean of the prompts; PSNR: of their videos to that run's.
cache-dit runs with the settings of its own example for this model (examples/pipeline/run_wan_2.2.py: first block alone
compared, threshold 0.08, at most two in a row, 8 of the high-noise expert's steps and 20 of the low-noise one's, its
TaylorSeer of first order), and with what its limits are lifted to for a fair match at other thresholds. It decides for
each guidance branch by itself: half a step is one forward of two.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor

from wan22 import Pipeline, sampling
from wan22.attention import functions, relative_error
from wan22.config import Lora, Precision, Request
from wan22.measuring.rivals import rival
from wan22.report import Reporter
from wan22.sampling import denoise, draw_noise, plan_steps
from wan22.step_cache import MOST_SKIPPED, StepCache

PROMPTS = (
    "a red circle moves to the right", "a green square moves up", "a large blue triangle falls", "一颗黄色的星星在旋转",
)  # fmt: skip
# name → cache-dit's settings: threshold, the most in a row, the most of each expert's steps (-1: any), TaylorSeer
CACHE_DIT = {
    "its example": (0.08, 2, (8, 20), True),
    "its example, without TaylorSeer": (0.08, 2, (8, 20), False),
    "0.12, 3 in a row": (0.12, 3, (-1, -1), True),
    "0.16, 3 in a row": (0.16, 3, (-1, -1), True),
    "0.2, 3 in a row": (0.2, 3, (-1, -1), True),
}
Made = tuple[Tensor, np.ndarray]  # latents, video
Denoised = Callable[[Request, Tensor, Tensor, Tensor], tuple[Tensor, float]]  # noise, both contexts → latents, skipped


class Bench:
    """The demo, its prompts, and the videos that nothing was skipped in."""

    def __init__(self, count: int, steps: int) -> None:
        self.pipe = Pipeline.from_pretrained("demo", device="cpu", precision=Precision("float32"))
        self.requests = [self.pipe.resolve(self.pipe.request(prompt, seed=seed, num_steps=steps))
                         for seed, prompt in enumerate(PROMPTS[:count])]  # fmt: skip
        self.steps, self.exact = steps, [self._make(request, self.ours(0.0))[0] for request in self.requests]

    def ours(self, threshold: float) -> Denoised:
        def run(request: Request, noise: Tensor, context: Tensor, negative: Tensor) -> tuple[Tensor, float]:
            self.pipe.experts.use(self.pipe.plan(request).ladder)
            cache = StepCache(threshold)
            return denoise(request, self.pipe.experts, noise, context, negative, cache=cache), cache.skipped

        return run

    def row(self, name: str, run: Denoised) -> str:
        made = [self._make(request, run) for request in self.requests]
        error = np.mean([relative_error(one[0], exact[0]) for (one, _), exact in zip(made, self.exact, strict=True)])
        squares = [((one[1].astype(float) - exact[1]) ** 2).mean()
                   for (one, _), exact in zip(made, self.exact, strict=True)]  # fmt: skip
        psnr = f"{10 * np.log10(255**2 / np.mean(squares)):6.1f} dB" if any(squares) else "equal"
        skipped = np.mean([skipped for _, skipped in made])
        return f"{name:<48}{skipped:6.1f} of {self.steps}{error:12.2e}{psnr:>12}"

    def _make(self, request: Request, run: Denoised) -> tuple[Made, float]:
        context, negative = self.pipe.encode([request.prompt, request.negative_prompt], Reporter())
        latents, skipped = run(request, draw_noise(request, self.pipe.device), context, negative)
        return (latents, np.concatenate(list(self.pipe.decode(latents)))), skipped


class Theirs:
    """Hands out diffusers' transformers where ours are expected (sampling.Experts)."""

    def __init__(self, models: dict[str, Callable[..., Tensor]]) -> None:
        self._models = {name: _Model(forward) for name, forward in models.items()}

    def get(self, name: str, loras: Sequence[Lora]) -> Any:
        return self._models[name]

    def expect(self, name: str, loras: Sequence[Lora]) -> None: ...

    def shrink(self) -> None: ...


class _Model:
    def __init__(self, forward: Callable[..., Tensor]) -> None:
        self._forward = forward

    def embed_context(self, context: Tensor) -> Tensor:
        return context

    def __call__(self, latents: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        return self._forward(latents, timestep, context)


@contextmanager
def cache_dit_run(
    pipe: Pipeline, threshold: float, in_a_row: int, most: tuple[int, int], taylor: bool
) -> Iterator[Denoised]:
    """A run of diffusers' two transformers with cache-dit around them."""
    import cache_dit
    from cache_dit import BlockAdapter, DBCacheConfig, ForwardPattern, ParamsModifier, TaylorSeerCalibratorConfig

    attend, names = functions("torch")[0], list(pipe.checkpoint.experts)
    computed = 0

    def count(*args: Any) -> None:
        nonlocal computed
        computed += 1

    with ExitStack() as stack:
        made = {name: stack.enter_context(rival("diffusers", expert, torch.float32, pipe.device, attend))
                for name, expert in pipe.checkpoint.experts.items()}  # fmt: skip
        models: list[Any] = [made[name][0] for name in names]
        for model in models:
            model.blocks[1].register_forward_hook(count)  # which a skipped forward does not come to
        modifiers = [ParamsModifier(cache_config=DBCacheConfig().reset(max_cached_steps=limit)) for limit in most]
        adapter = cache_dit.enable_cache(
            BlockAdapter(transformer=models, blocks=[model.blocks for model in models],
                         forward_pattern=[ForwardPattern.Pattern_2] * 2, params_modifiers=modifiers,
                         has_separate_cfg=True),
            cache_config=DBCacheConfig(Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=2,
                                       max_continuous_cached_steps=in_a_row, residual_diff_threshold=threshold),
            calibrator_config=TaylorSeerCalibratorConfig(taylorseer_order=1) if taylor else None,
        )  # fmt: skip

        def run(request: Request, noise: Tensor, context: Tensor, negative: Tensor) -> tuple[Tensor, float]:
            nonlocal computed
            computed, turns = 0, [step.expert for step in plan_steps(request)]
            for name, model in zip(names, models, strict=True):
                cache_dit.refresh_context(model, num_inference_steps=turns.count(name))
            theirs = Theirs({name: forward for name, (_, forward) in made.items()})
            latents = denoise(request, theirs, noise, context, negative)
            return latents, len(turns) - computed / 2

        try:
            yield run
        finally:
            cache_dit.disable_cache(adapter)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--thresholds", default="0.04,0.08,0.12,0.16,0.2")
    parser.add_argument("--in-a-row", default=f"{MOST_SKIPPED}", help="of ours, steps that are skipped; several: 2,3")
    parser.add_argument("--against", choices=("cache-dit",))
    parser.add_argument("--prompts", type=int, default=2, help="at most 4")
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    if args.against:
        os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "WARNING")  # it tells much, on stdout
        try:
            import cache_dit  # noqa: F401
        except ImportError as error:
            raise SystemExit(f"error: {error}\nhint: pip install --no-deps cache-dit==1.5.3") from None
    bench = Bench(args.prompts, args.steps)
    print(f"{'':<48}{'steps skipped':>12}{'error':>10}{'PSNR':>12}")
    for sampling.MOST_SKIPPED in map(int, args.in_a_row.split(",")):
        for threshold in map(float, filter(None, args.thresholds.split(","))):
            name = f"ours, {threshold:g}, {sampling.MOST_SKIPPED} in a row"
            print(bench.row(name, bench.ours(threshold)), flush=True)
    for name, settings in CACHE_DIT.items() if args.against else ():
        with cache_dit_run(bench.pipe, *settings) as run:
            print(bench.row(f"cache-dit, {name}", run), flush=True)


if __name__ == "__main__":
    main()
