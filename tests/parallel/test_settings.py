"""Several ranks with what is approximated, kept or shown beside: alike on all of them, and none waits in vain."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import TINY
from together import CPU, run

from wan22 import pipeline as pipelines
from wan22 import text_encoder
from wan22.attention import relative_error
from wan22.checkpoint import open_checkpoint
from wan22.config import Placement, Precision, Request
from wan22.experts import Experts
from wan22.files import reading
from wan22.parallel import Ranks
from wan22.pipeline import Pipeline
from wan22.preview import Preview
from wan22.prompt_cache import VARIABLE
from wan22.report import Reporter
from wan22.sampling import plan_steps
from wan22.several.launch import Team
from wan22.several.mesh import Mesh

REQUEST = Request("a red ball", "blurred", width=48, height=32, num_frames=9, num_steps=5, shift=5.0, seed=7)
ONE_BRANCH = dataclasses.replace(REQUEST, guidance_low=1.0)  # of its low-noise steps
LONG = dataclasses.replace(REQUEST, num_frames=5, num_steps=12)
TWO = [(2, 1, 1), (1, 1, 2), (1, 2, 1)]


def make_pipe(rank, world, mesh, precision=Precision("float32"), sharded=False, text=False, cache=False):  # noqa: B008
    """Of one rank; of one process alone where there is one."""
    ranks = Ranks(Team(rank, world, rank, world), Mesh(*mesh), CPU, sharded, text) if world > 1 else None
    return Pipeline(open_checkpoint(TINY), precision, Placement("cpu", prompt_cache=cache), ranks=ranks)


def make_latents(pipe, request=REQUEST):
    return pipe.denoise(pipe.resolve(request), Reporter())


# --- a whole run's work ----------------------------------------------------------------------------------------------
def _passes(rank, world, mesh, sharded):
    found = []
    for request in (REQUEST, ONE_BRANCH):
        pipe = make_pipe(rank, world, mesh, sharded=sharded)
        make_latents(pipe, request)
        found.append((pipe.ranks.counts.passes, pipe.ranks.counts.tokens))
    return found


@pytest.mark.parametrize(("mesh", "sharded"), [(mesh, False) for mesh in [*TWO, (2, 1, 2)]] + [((2, 1, 1), True)])
def test_each_branch_is_computed_once(mesh, sharded):
    """In a run, too: a rank passes through the model once a guided step where the branches are divided, and has half
    of the tokens in a step that has one branch."""
    mesh, tokens = Mesh(*mesh), 3 * 2 * 3
    guided, single = plan_steps(REQUEST), plan_steps(ONE_BRANCH)
    one = sum(step.guidance == 1 for step in single)
    assert 0 < one < len(single)
    results = run(mesh.world, _passes, (mesh.guidance, mesh.ring, mesh.ulysses), sharded)
    a_step = 2 // mesh.guidance
    for rank, ((passes, last), (passes_of_single, last_of_single)) in enumerate(results):
        assert passes == a_step * len(guided)
        assert passes_of_single == a_step * (len(single) - one) + one
        order = rank % mesh.sequence
        assert last == tokens // mesh.sequence + (order < tokens % mesh.sequence)
        assert last_of_single == tokens // mesh.world + (rank < tokens % mesh.world)


# --- what is approximated --------------------------------------------------------------------------------------------
STEP = dataclasses.replace(REQUEST, num_steps=1)  # more of them would carry one flipped rounding everywhere


def _with_int8_attention(rank, world, mesh):
    return make_latents(make_pipe(rank, world, mesh, Precision("float32", attention="int8")), STEP)


def test_attention_in_8_bits():
    """A head is a head wherever it is; along the ring queries are evened out by a rank's own, and as exact."""
    exact, wanted = make_latents(make_pipe(0, 1, (1, 1, 1)), STEP), _with_int8_attention(0, 1, (1, 1, 1))
    drift = relative_error(wanted, exact)
    assert drift > 1e-3  # it does something
    for mesh in TWO:
        results = run(2, _with_int8_attention, mesh)
        assert torch.equal(*results)
        apart, drifted = relative_error(results[0], wanted), relative_error(results[0], exact)
        print(f"{Mesh(*mesh)}: {apart:.1e} from one process; {drifted:.1e} from exact, one process {drift:.1e}")
        assert apart < (2 * drift if mesh[1] > 1 else 1e-4)
        assert drifted < 1.5 * drift


def _frames(rank, world, mesh):
    pipe = make_pipe(rank, world, mesh, Precision("float32", vae="bf16"))
    return list(pipe.decode(torch.randn(16, 4, 6, 10, generator=torch.Generator().manual_seed(2))))


@pytest.mark.parametrize("world", [2, 3])
def test_the_vae_in_bf16(world):
    """Two latent frames at a time, as one process has it."""
    alone = _frames(0, 1, (1, 1, 1))
    first, *others = run(world, _frames, (1, 1, world))
    assert others == [[]] * (world - 1)
    assert [len(chunk) for chunk in first] == [len(chunk) for chunk in alone] == [1, 8, 4]
    ours, expected = (np.concatenate(chunks).astype(int) for chunks in (first, alone))
    exact = np.concatenate(list(make_pipe(0, 1, (1, 1, 1)).decode(
        torch.randn(16, 4, 6, 10, generator=torch.Generator().manual_seed(2))))).astype(int)  # fmt: skip
    apart, drift = (np.sqrt(((one - expected) ** 2).mean()) for one in (ours, exact))
    print(f"{world} ranks {apart:.2f} of 255 from one, whose bf16 is {drift:.2f} from float32")
    assert 0 < drift < 3
    assert apart < max(0.5, drift)


class Broken(Reporter):
    """A run that ends in the middle."""

    def __init__(self, at):
        super().__init__()
        self.at, self.skipped = at, None

    def step(self, index, expert, timestep):
        if index == self.at:
            raise InterruptedError

    def note(self, text, **data):
        self.skipped = data.get("skipped", self.skipped)


def _broken_off(rank, world, mesh, output, at):
    """Latents of a run with a step cache, after it was broken off where `at` says so."""
    pipe = make_pipe(rank, world, mesh, Precision("float32", step_cache=2.0))
    request, state = pipe.begin(LONG, output, overwrite=False)
    heard = Broken(at)
    try:
        with state:
            latents = pipe.denoise(request, heard, state)
    except InterruptedError:
        return None
    return latents, heard.skipped


@pytest.mark.parametrize("mesh", TWO[:2])
def test_a_step_cache_survives(mesh, tmp_path):
    """A run that is broken off where steps are skipped goes on as it would have: all ranks fill the cache again."""
    (wanted, skipped), _ = run(2, _broken_off, mesh, tmp_path / "whole.mp4", None)
    assert skipped > 2
    for at in (4, 5, 6):
        output = tmp_path / f"{at}.mp4"
        assert run(2, _broken_off, mesh, output, at) == [None, None]
        (latents, _), (others, _) = run(2, _broken_off, mesh, output, None)
        assert torch.equal(latents, wanted)
        assert torch.equal(others, wanted)


# --- what is kept, and shown -----------------------------------------------------------------------------------------
class Forbidden:
    def __init__(self, *args):
        raise AssertionError("the text encoder was asked for")


def _encoded(rank, world, folders, text, prompts, forbidden):
    import os

    os.environ[VARIABLE] = str(folders[rank])
    if forbidden:
        text_encoder.TextEncoder = Forbidden
    return make_pipe(rank, world, (1, 1, world), text=text, cache=True).encode(prompts, Reporter())


@pytest.mark.parametrize("text", [False, True], ids=["first rank", "sharded"])
def test_encoded_prompts_are_found_by_all(text, tmp_path):
    """Those of the first rank's folder; the other one may have another machine's, or none."""
    folders, prompts = [tmp_path / "first", tmp_path / "second"], ["a red ball", "a blue cube"]
    made = run(2, _encoded, folders, text, prompts[:1], False)
    assert len(list(folders[0].iterdir())) == 1
    assert not folders[1].exists()
    again = run(2, _encoded, folders, text, prompts[:1], True)
    more = run(2, _encoded, folders, text, prompts, False)  # one is found, one is not
    alone = make_pipe(0, 1, (1, 1, 1)).encode(prompts, Reporter())
    for contexts in (*made, *again, *more):
        assert all(map(torch.equal, contexts, alone))
    assert len(list(folders[0].iterdir())) == 2
    assert not folders[1].exists()
    # Only the second one has them: all encode.
    assert all(map(torch.equal, run(2, _encoded, [tmp_path / "third", folders[0]], text, prompts, False)[1], alone))


def _in_a_file(rank, world, output):
    made = []

    class Counted(Preview):
        def __init__(self, *args):
            made.append(rank)
            super().__init__(*args)

    pipelines.Preview = Counted
    pipe, seen = make_pipe(rank, world, (2, 1, 1)), []

    class Looking(Reporter):
        def step(self, index, expert, timestep):
            seen.append(output.with_suffix(".preview.webp").exists())

    request, state = pipe.begin(dataclasses.replace(LONG, num_steps=60), output, overwrite=False)
    with state:
        pipe.generate_file(request, state, "error", False, Looking(), preview=True)
    return made, any(seen)


def test_a_preview_is_the_first_rank_s(tmp_path):
    output = tmp_path / "video.mp4"
    (first, seen), (second, _) = run(2, _in_a_file, output)
    assert (first, second) == ([0], [])
    assert seen
    assert [path.name for path in tmp_path.iterdir()] == ["video.mp4"]


# --- the first expert, read early ------------------------------------------------------------------------------------
def _early(rank, world, sharded, unlucky):
    """Latents; how often reading began early; bytes read of the first expert's files."""
    begun, read, begin, fill = [], [], Experts._begin_placing, reading._Lane._fill

    def counted(experts, key):
        begun.append(key.name)
        if rank == unlucky and len(begun) == 1:
            raise torch.OutOfMemoryError("no room")
        return begin(experts, key)

    def noted(lane, offset, array):
        if "high_noise_model" in str(lane.file.name):
            read.append(len(array))
        fill(lane, offset, array)

    Experts._begin_placing, reading._Lane._fill = counted, noted
    pipe = make_pipe(rank, world, (1, 1, world), sharded=sharded)
    return make_latents(pipe), begun, sum(read)


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize("unlucky", [None, 0, 1])
def test_the_first_expert_is_read_early(sharded, unlucky):
    """By all ranks, each its part; and where one of them has no room for it yet, the others wait for it."""
    wanted = make_latents(make_pipe(0, 1, (1, 1, 1)))
    tensors = open_checkpoint(TINY).experts["high_noise_model"].tensors
    results = run(2, _early, sharded, unlucky)
    for latents, begun, _ in results:
        assert (latents - wanted).abs().max() < 1e-4
        assert begun[0] == "high_noise_model"
    odd = 0 if sharded else sum(size for name, size in tensors.sizes.items() if tensors.shapes[name][0] % 2)
    assert sum(read for *_, read in results) == sum(tensors.sizes.values()) + odd
