"""The step cache: exact at zero, apart for each expert, branch and run, and the same after any interruption."""

import pytest
import torch
from test_placements import REQUEST, deep, failing  # noqa: F401 (fixtures)

from wan22 import step_cache
from wan22.config import Placement, Precision, Residency
from wan22.experts import Experts
from wan22.load import load_expert
from wan22.model import Block
from wan22.pipeline import Pipeline
from wan22.plan import make_plan
from wan22.report import Reporter
from wan22.residency.memory import Memory
from wan22.sampling import denoise, draw_noise
from wan22.state import RunState, begin_given, read_state, state_path
from wan22.step_cache import StepCache, always_computed

CPU = torch.device("cpu")
HIGH = "high_noise_model"
# Random weights: their first block changes by half from step to step, where a trained one changes by a tenth.
LONG = {**REQUEST.to_dict(), "num_steps": 14, "shift": 8.0}


@pytest.fixture
def counted(monkeypatch):
    """How often a block computes."""
    calls, forward = [], Block.forward

    def count(self, *args):
        calls.append(self)
        return forward(self, *args)

    monkeypatch.setattr(Block, "forward", count)
    return calls


def pipe(checkpoint, threshold, residency=None):
    made = Pipeline(checkpoint, Precision("float32", step_cache=threshold), Placement("cpu"))
    if residency:
        made.experts = Experts(checkpoint, torch.float32, CPU, made.adapters, residency, Memory(CPU, has_host=True))
        made.experts.use = lambda ladder: None
    return made


def run(made, begun=None, keep=lambda progress: None, request=None):
    """Latents and the cache."""
    request = made.resolve(request or type(REQUEST).from_dict(LONG))
    cache = StepCache(made.precision.step_cache)
    contexts = made.encode([request.prompt, request.negative_prompt], Reporter())
    latents = denoise(request, made.experts, draw_noise(request, CPU), *contexts, begun=begun, keep=keep, cache=cache)
    return latents, cache


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_which_steps_are_always_computed():
    assert always_computed("aaaaaabbbb") == {0, 1, 2, 5, 6, 7, 8, 9}
    assert always_computed("ab") == {0, 1}
    assert always_computed("") == set()


def test_exact_at_zero_and_closer_the_smaller(tiny, counted):
    exact, cache = run(pipe(tiny, 0.0))
    whole = len(counted)
    assert (cache.skipped, whole) == (0, 14 * 2 * len(pipe(tiny, 0.0).experts._empty[HIGH].blocks))
    counted.clear()
    errors = []
    for threshold in (1e-9, 0.6, 0.9):
        latents, cache = run(pipe(tiny, threshold))
        errors.append(relative(latents, exact))
        print(f"threshold {threshold}: {cache.skipped} of 14 steps skipped, {len(counted)} of {whole} blocks computed, "
              f"latents' relative error {errors[-1]:.2e}")  # fmt: skip
        if threshold == 1e-9:
            assert torch.equal(latents, exact)
            assert (cache.skipped, len(counted)) == (0, whole)
        else:
            assert cache.skipped > 0
            assert len(counted) == whole - cache.skipped * 2 * (whole // 28 - 1)
        counted.clear()
    assert errors[0] == 0 < errors[1] < 0.05
    assert errors[1] <= errors[2] < 0.5  # what changes by nine tenths goes on in no straight line


def test_first_and_last_steps_and_no_long_rows_are_skipped(tiny, monkeypatch):
    """With a threshold that lets everything pass, what is left is what is always computed."""
    seen = []
    end_step = StepCache.end_step
    monkeypatch.setattr(StepCache, "end_step", lambda self: seen.append(end_step(self)) or seen[-1])
    request = pipe(tiny, 9.0).resolve(type(REQUEST).from_dict(LONG))
    from wan22.sampling import plan_steps

    experts = [step.expert for step in plan_steps(request)]
    run(pipe(tiny, 9.0))
    computed = {index for index, fresh in enumerate(seen) if fresh}
    assert always_computed(experts) <= computed
    skipped_in_a_row = max(len(part) for part in "".join("x" if fresh else "." for fresh in seen).split("x"))
    assert skipped_in_a_row == min(step_cache.MOST_SKIPPED, skipped_in_a_row) > 0


def test_nothing_leaks_into_the_next_video(tiny):
    made = pipe(tiny, 0.65)
    made.experts.ladder = [Residency("none")]
    made.experts.use = lambda ladder: None
    first, _ = run(made)
    models = [made.experts.get(name) for name in tiny.experts]
    assert all("run_blocks" not in vars(model) for model in models)
    other = type(REQUEST).from_dict({**LONG, "prompt": "a green square", "seed": 1})
    run(made, request=other)
    assert torch.equal(run(made)[0], first)
    assert all(model is made.experts.get(name) for model, name in zip(models, tiny.experts, strict=True))


def test_branches_are_kept_apart_and_decide_together(tiny):
    model, cache = load_expert(tiny.experts[HIGH], torch.float32, CPU), StepCache(0.5)
    with torch.inference_mode():
        prompts = [model.embed_context(torch.full((1, 3, model.text_embedding[0].in_features), n)) for n in (1.0, 2.0)]
        latents = torch.randn(1, 16, 1, 8, 8, generator=torch.Generator().manual_seed(0))

        numbers = iter(range(9))

        def evaluate(shift, may_skip):
            cache.begin_step(next(numbers), may_skip)
            out = [model(latents + shift, torch.tensor([900.0]), prompt) for prompt in prompts]
            return out, cache.end_step()

        cache.attach(model)
        exact, computed = evaluate(0.0, may_skip=True)
        assert computed, "nothing is known yet"
        again, computed = evaluate(0.0, may_skip=True)
        assert not computed
        for one, other in zip(again, exact, strict=True):
            assert torch.allclose(one, other, atol=1e-5)
        assert (exact[0] - exact[1]).abs().max() > 1e-3
        assert evaluate(5.0, may_skip=True)[1], "too much has changed"
        assert evaluate(5.0, may_skip=False)[1]
        cache.detach()
        assert "run_blocks" not in vars(model)
        assert cache._branches == {}


def test_what_changes_evenly_goes_on_so():
    """A contribution known once is taken as it was; known twice, it goes on from there as it changed between."""

    class Model:
        dtype, rest = torch.float32, 0.0

        def __init__(self):
            self.blocks = [lambda x, *others: x + 1, lambda x, *others: x + self.rest]

    model, cache, context = Model(), StepCache(0.1), [None, None]
    cache.attach(model)

    def step(index, rest, may_skip=True):
        model.rest = rest
        cache.begin_step(index, may_skip)
        out = model.run_blocks(torch.zeros(1, 3, 4), None, None, context)
        return out.unique().item() - 1, cache.end_step()

    assert step(0, 5.0) == (5, True)
    assert step(1, 9.0) == (5, False)
    assert step(2, 6.0, may_skip=False) == (6, True)
    assert step(3, 9.0) == (6.5, False)
    assert step(5, 9.0) == (7.5, False)
    assert step(6, 4.0, may_skip=False) == (4, True)
    assert step(7, 9.0) == (3.5, False)
    cache.attach(model)
    assert step(8, 2.0) == (2, True), "nothing is remembered of what was before"
    assert step(9, 9.0) == (2, False)


def test_processes_decide_alike(tiny):
    """What each of them sees alone would have some skip and others not."""
    asked = []

    def decisions(seen):
        cache = StepCache(0.65, agree=lambda sums: asked.append(sums) or [sums[0] * seen, sums[1]])
        made = pipe(tiny, 0.65)
        request = made.resolve(type(REQUEST).from_dict(LONG))
        contexts = made.encode([request.prompt, request.negative_prompt], Reporter())
        denoise(request, made.experts, draw_noise(request, CPU), *contexts, cache=cache)
        return cache.skipped

    few, usual, many = decisions(10.0), decisions(1.0), decisions(0.01)
    assert few == 0 < usual < many
    assert all(isinstance(number, float) for sums in asked for number in sums)


@pytest.mark.parametrize("fractions", [(1, 5, 7, 10, 13)])
def test_going_on_from_any_step_is_bit_identical(tiny, tmp_path, fractions):
    kept = []
    whole, cache = run(pipe(tiny, 0.65), keep=kept.append)
    assert 2 < cache.skipped < 12
    record = {"request": LONG | {"seed": 1}, "precision": {}, "versions": {}, "checkpoint": "x"}
    for done in fractions:
        output = tmp_path / f"{done}.mp4"
        state: RunState = begin_given(output, record, any_seed=False, overwrite=False, steps=14, save_every=1e6)
        with state:
            state.keep(kept[done - 1])
            state._save_now()
            begun = read_state(state_path(output)).progress()
        assert begun.computed
        assert len(begun.computed) == min(done, 2)
        assert begun.computed[0][0] <= begun.computed[-1][0] < begun.done == done
        assert torch.equal(run(pipe(tiny, 0.65), begun)[0], whole), done


def test_progress_without_a_cache_is_what_it_was(tiny):
    kept = []
    run(pipe(tiny, 0.0), keep=kept.append)
    assert all(progress.computed == () for progress in kept)


@pytest.mark.parametrize("residency", [Residency("expert"), Residency("block", 2, 1), Residency("disk")], ids=str)
def test_placements_are_bit_identical(deep, residency, counted):  # noqa: F811
    expected, cache = run(pipe(deep, 0.65, [Residency("none")]))
    assert cache.skipped
    latents, other = run(pipe(deep, 0.65, [residency]))
    assert torch.equal(latents, expected)
    assert other.skipped == cache.skipped


@pytest.mark.parametrize("at", [20, 60, 75])
def test_out_of_memory_changes_nothing(deep, monkeypatch, at):  # noqa: F811
    ladder = [Residency("expert"), Residency("block", 2, 1)]
    expected, _ = run(pipe(deep, 0.65, ladder))
    monkeypatch.setattr(Block, "forward", failing(Block.forward, at))
    assert torch.equal(run(pipe(deep, 0.65, ladder))[0], expected)


def test_memory_is_planned(tiny):
    from wan22.machine import Room
    from wan22.sizes import Sizes

    sizes, terms = Sizes.published(), []
    for threshold in (0.0, 0.1):
        precision, host = Precision("bf16", step_cache=threshold), Room(1 << 40, 1 << 40)
        terms.append(make_plan(REQUEST, precision, Placement(), sizes, None, host).options[0].phases["denoise"])
    assert "step cache" not in terms[0]
    assert terms[1]["step cache"] == 2 * 2 * 2 * 5120 * (2 * 2 * 2 + 4)  # tokens of the request, width, bytes
