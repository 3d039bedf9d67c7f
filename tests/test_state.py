"""What a kill costs: the state beside the output, who may go on with it, and that the bits are the same."""

import errno
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import ROOT, TINY

from wan22 import cli, sampling, state
from wan22.config import Request, RequestError
from wan22.many import claim
from wan22.output.names import beside, staging_prefix
from wan22.sampling import denoise, draw_noise, make_solver, remember
from wan22.state import Progress, RunState, read_state, state_path

TYPED = ["generate", "--ckpt_dir", str(TINY), "--size", "64*48", "--frames", "5", "--steps", "4", "--prompt", "A ball"]
CPU = torch.device("cpu")
REQUEST = {"prompt": "x", "width": 64, "height": 64, "num_frames": 5, "seed": 1}
RECORD = {"request": REQUEST, "precision": {}, "versions": {}, "checkpoint": "x"}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def run(capsys, *words):
    try:
        code = cli.main([str(word) for word in words])
    except SystemExit as error:
        code = error.code
    out, err = capsys.readouterr()
    return code, out, err


def files(folder):
    return sorted(path.name for path in folder.iterdir())


# --- the solver's memory ---------------------------------------------------------------------------------------------
class Model:
    def embed_context(self, context):
        return context

    def __call__(self, latents, timestep, context):
        return torch.sin(latents * 3 + timestep.item()) * context.mean()


class Experts:
    def get(self, name, loras=()):
        return Model()

    def expect(self, name, loras=()): ...

    def shrink(self): ...


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
def test_nothing_that_a_solver_changes_is_forgotten(solver):
    """A new attribute in a new diffusers, or an old one that begins to change, fails here."""

    def image(value):
        return value.tolist() if isinstance(value, torch.Tensor) else repr(value)

    one = make_solver(Request("x", num_steps=6, solver=solver))
    before = {name: image(value) for name, value in vars(one).items()}
    latents = torch.randn(1, 16, 2, 4, 4)
    changed = set()
    for timestep in one.timesteps:
        latents = one.step(torch.randn_like(latents), timestep, latents, return_dict=False)[0]
        changed |= {name for name, value in vars(one).items() if image(value) != before.get(name)}
    assert changed <= set(sampling.SOLVER_MEMORY)
    assert changed == set(remember(one)) & changed
    assert changed


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
def test_going_on_from_any_step_is_bit_identical(solver, tmp_path):
    request = Request("x", width=64, height=64, num_frames=5, num_steps=7, seed=1, solver=solver)
    noise, ones, twos = draw_noise(request, CPU), torch.ones(3, 8), torch.full((3, 8), 2.0)
    kept = []
    whole = denoise(request, Experts(), noise, ones, twos, keep=kept.append)
    assert [progress.done for progress in kept] == list(range(1, 8))
    for progress in kept[:-1]:
        with held(tmp_path / "v.mp4") as run_state:
            run_state.keep(progress)
            run_state._save_now()
        begun = read_state(state_path(tmp_path / "v.mp4")).progress()
        assert begun.done == progress.done
        assert torch.equal(denoise(request, Experts(), noise, ones, twos, begun=begun), whole)


def held(output, save_every=1e6, steps=7):
    taken = claim.take(state.claim_path(output))
    assert taken
    return RunState(output, RECORD, taken, steps=steps, save_every=save_every, automatic=False)


# --- the file --------------------------------------------------------------------------------------------------------
def test_saving_waits_for_nothing(tmp_path, monkeypatch):
    slow, written = threading.Event(), []

    def write(path, tensors, metadata):
        slow.wait(10)
        written.append(json.loads(metadata["state"])["done"])
        path.touch()

    monkeypatch.setattr(state, "_write", write)
    with held(tmp_path / "v.mp4", save_every=0) as run_state:
        start = time.perf_counter()
        for done in range(1, 6):
            run_state.keep(Progress(done, torch.zeros(16, 2, 4, 4), {}))
        assert time.perf_counter() - start < 0.5
        slow.set()
        run_state.finish(torch.zeros(16, 2, 4, 4))
        assert written == [1, 7]  # one at a time, the newest when it is due
        run_state.close()
    assert files(tmp_path) == []


def test_a_full_disk_costs_the_state_and_not_the_run(capsys, elsewhere, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(state, "_write", full)
    code, _, err = run(capsys, *TYPED, "--output", "v.mp4", "--save-every", "0")
    assert (code, "the disk is full" in err) == (0, True)
    assert files(elsewhere) == ["v.mp4"]


def test_a_disk_that_is_full_at_the_start_is_told(capsys, elsewhere, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(claim, "take", full)
    for words in (["--output", "v.mp4"], []):
        code, _, err = run(capsys, *TYPED, *words)
        assert (code, err.splitlines()[-1].endswith(".mp4: the disk is full")) == (1, True)
    assert files(elsewhere) == []


def test_a_broken_state_is_told(capsys, elsewhere):
    (elsewhere / "v.state.safetensors").write_bytes(b"torn")
    code, _, err = run(capsys, *TYPED, "--output", "v.mp4")
    assert (code, "v.state.safetensors" in err) == (2, True)
    assert run(capsys, *TYPED, "--output", "v.mp4", "--overwrite")[0] == 0
    assert files(elsewhere) == ["v.mp4"]


# --- whole commands --------------------------------------------------------------------------------------------------
@pytest.fixture
def stop_at(monkeypatch):
    """Have something happen once, after a step."""
    from wan22.report import ConsoleReporter

    def plan(step, action):
        original = ConsoleReporter.step

        def stepped(self, index, expert, timestep):
            original(self, index, expert, timestep)
            if index + 1 == step:
                monkeypatch.setattr(ConsoleReporter, "step", original)
                action()

        monkeypatch.setattr(ConsoleReporter, "step", stepped)

    return plan


class Last:
    """What a library lets go of at a bad moment."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        [None for _ in range(1000)]


def test_a_signal_that_a_library_swallows_comes_again(capsys, elsewhere, stop_at):
    def swallow():
        Last()  # gone at once
        time.sleep(0.5)

    stop_at(3, swallow)
    code, _, err = run(capsys, *TYPED, "--output", "v.mp4")
    assert (code, "Traceback" in err, "step 3 of" in err) == (143, False, True)
    assert files(elsewhere) == ["v.state.safetensors"]


def test_a_signal_while_a_library_is_imported_waits_for_it(capsys, elsewhere, stop_at, monkeypatch, tmp_path_factory):
    library = tmp_path_factory.mktemp("library")
    (library / "signalled.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(0.2)\nWHOLE = True\n"
    )
    monkeypatch.syspath_prepend(library)

    def importing():
        assert importlib.import_module("signalled").WHOLE
        time.sleep(0.5)

    stop_at(3, importing)
    code, _, err = run(capsys, *TYPED, "--output", "v.mp4")
    assert (code, err.splitlines()[-1].startswith("interrupted; ")) == (130, True)
    assert files(elsewhere) == ["v.state.safetensors"]


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_keeps_the_state_and_the_same_command_goes_on(capsys, elsewhere, stop_at, signum, code):
    stop_at(3, lambda: os.kill(os.getpid(), signum))
    stopped = run(capsys, *TYPED)
    assert stopped[0] == code
    assert "step 3 of 4" in stopped[2].splitlines()[-1]
    assert "same command" in stopped[2].splitlines()[-1]
    (left,) = files(elsewhere)
    assert left.endswith(".state.safetensors")
    record = json.loads(run(capsys, "show", left)[1])
    seed = record["request"]["seed"]

    # Another request, or another seed, does not touch it; the same command does, though it does not know the seed.
    assert run(capsys, *TYPED, "--seed", seed + 1, "--steps", "1", "--dry-run")[0] == 0
    again = run(capsys, *TYPED)
    assert again[0] == 0
    assert f"going on from step 3 of 4, seed {seed}" in again[2]
    assert files(elsewhere) == [again[1].strip()] == [left.replace(".state.safetensors", ".mp4")]
    assert run(capsys, *TYPED, "--seed", seed, "--output", "whole.mp4")[0] == 0
    assert (elsewhere / "whole.mp4").read_bytes() == (elsewhere / again[1].strip()).read_bytes()


def test_a_changed_request_never_resumes_silently(capsys, elsewhere, stop_at):
    stop_at(2, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert run(capsys, *TYPED, "--seed", "5", "--output", "v.mp4")[0] == 130
    for words, said in ((["--seed", "6"], "seed is 5 there and 6 here"), (["--steps", "3"], "num_steps is 4"),
                        (["--dtype", "bf16"], 'weights is "float32" there and "bf16" here')):  # fmt: skip
        code, _, err = run(capsys, *TYPED, "--output", "v.mp4", *words)
        assert (code, said in err, "--overwrite" in err) == (2, True, True)
        assert files(elsewhere) == ["v.state.safetensors"]
    before = (elsewhere / "v.state.safetensors").read_bytes()
    assert run(capsys, *TYPED, "--output", "v.mp4", "--seed", "6", "--steps", "1", "--overwrite")[0] == 0
    assert files(elsewhere) == ["v.mp4"]
    # The other way round: an automatic name never takes up a run whose name was given.
    (elsewhere / "w.state.safetensors").write_bytes(before)
    assert state.unfinished(elsewhere, read_state(elsewhere / "w.state.safetensors").record, False) == []


def test_another_checkpoint_never_resumes_silently(capsys, elsewhere, stop_at, tiny_copy):
    stop_at(2, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert run(capsys, *TYPED, "--output", "v.mp4")[0] == 130
    shard = next((tiny_copy / "low_noise_model").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\1")
    code, _, err = run(capsys, *TYPED, "--ckpt_dir", tiny_copy, "--output", "v.mp4")
    assert (code, "the checkpoint is another" in err) == (2, True)


def test_a_kill_just_before_the_end_is_tidied_up(capsys, elsewhere, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(RunState, "close", lambda *args: os.kill(os.getpid(), signal.SIGINT))
        assert run(capsys, *TYPED, "--seed", "5", "--output", "v.mp4")[0] == 130
    assert files(elsewhere) == ["v.mp4", "v.state.safetensors"]
    (elsewhere / (staging_prefix(elsewhere / "v.mp4") + "xyz")).mkdir()
    made = (elsewhere / "v.mp4").read_bytes()
    assert run(capsys, *TYPED, "--seed", "5", "--output", "v.mp4")[:2] == (0, "v.mp4\n")
    assert files(elsewhere) == ["v.mp4"]
    assert (elsewhere / "v.mp4").read_bytes() == made
    assert run(capsys, *TYPED, "--seed", "5", "--output", "v.mp4")[0] == 2  # now it is there, as any other


def test_it_is_packed_as_the_last_command_says(capsys, elsewhere, stop_at):
    """How a file is encoded comes after all that a state holds; frames a second are the request's."""
    stop_at(3, lambda: os.kill(os.getpid(), signal.SIGINT))
    words = [*TYPED, "--seed", "5", "--output", "v.mp4", "--keep-latents"]
    assert run(capsys, *words)[0] == 130
    code, _, err = run(capsys, *words, "--fps", "8")
    assert (code, "fps is 16 there and 8 here" in err) == (2, True)
    code, _, err = run(capsys, *words, "--crf", "40", "--codec", "libx265")
    assert (code, "going on from step 3" in err) == (0, True)
    assert run(capsys, *words[:-3], "--output", "w.mp4", "--crf", "40", "--codec", "libx265")[0] == 0
    assert (elsewhere / "v.mp4").read_bytes() == (elsewhere / "w.mp4").read_bytes()
    assert state.read_latents_record(elsewhere / "v.latents.safetensors")["encoding"]["crf"] == 40


def test_packed_otherwise_and_killed_at_the_end(capsys, elsewhere, monkeypatch):
    """What lies beside the file then is known to be of it."""
    words = [*TYPED, "--seed", "5", "--output", "v.mp4"]
    with monkeypatch.context() as patch:
        patch.setattr("wan22.pipeline._write", lambda *args: os.kill(os.getpid(), signal.SIGINT))
        assert run(capsys, *words)[0] == 130
    with monkeypatch.context() as patch:
        patch.setattr(RunState, "close", lambda *args: os.kill(os.getpid(), signal.SIGINT))
        assert run(capsys, *words, "--crf", "40")[0] == 130
    assert files(elsewhere) == ["v.mp4", "v.state.safetensors"]
    assert run(capsys, *words, "--crf", "40")[:2] == (0, "v.mp4\n")
    assert files(elsewhere) == ["v.mp4"]


# --- claims ----------------------------------------------------------------------------------------------------------
def test_one_process_makes_a_file(tmp_path):
    path = tmp_path / ".v.claim"
    mine = claim.take(path)
    assert mine
    assert claim.take(path) is None
    assert str(os.getpid()) in claim.holder(path)
    mine.release()
    assert files(tmp_path) == []


def test_a_dead_process_holds_nothing(tmp_path):
    path = tmp_path / ".v.claim"
    script = f"import os, pathlib; from wan22.many import claim; claim.take(pathlib.Path({str(path)!r})); os._exit(9)"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False)
    assert path.exists()
    assert claim.holder(path) is None
    winners = []
    threads = [threading.Thread(target=lambda: winners.append(claim.take(path))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(winner is not None for winner in winners) == 1
    assert files(tmp_path) == [".v.claim"]


def test_another_host_holds_as_long_as_it_renews(tmp_path):
    path = tmp_path / ".v.claim"
    path.write_text(json.dumps({"host": "elsewhere/pid:[1]", "pid": 1, "began": 1.0, "token": "x"}))
    assert claim.take(path) is None
    assert "elsewhere" in claim.holder(path)
    os.utime(path, (time.time() - claim.STALE - 5,) * 2)
    taken = claim.take(path)
    assert taken
    taken.release()


def test_a_run_that_is_being_made_is_refused(capsys, elsewhere):
    with held(elsewhere / "v.mp4"):
        code, _, err = run(capsys, *TYPED, "--output", "v.mp4")
        assert (code, f"process {os.getpid()}" in err) == (2, True)


def test_long_names_stay_apart(tmp_path):
    one, two = (tmp_path / ("長" * 80 + end + ".mp4") for end in "ab")
    assert beside(one, state.STATE) != beside(two, state.STATE)
    assert len(beside(one, state.STATE).name.encode()) <= 255
    assert staging_prefix(one) != staging_prefix(two)
    with pytest.raises(RequestError):
        read_state(tmp_path / "none")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kills_at_random_points():
    """The short form of scripts/fault_test.py."""
    words = ["--points", "5", "--size", "64x48", "--frames", "5", "--steps", "8"]
    result = subprocess.run([sys.executable, "scripts/fault_test.py", *words], cwd=ROOT, capture_output=True, text=True)
    print(result.stdout)
    assert (result.returncode, "5 of 5 held" in result.stdout) == (0, True), result.stdout + result.stderr
