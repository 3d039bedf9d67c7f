"""A process that dies, hangs or fails: all stop, its error is told once, and the same command goes on."""

import contextlib
import functools
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY
from safetensors.torch import load_file
from together import ForkedPopen

from wan22 import cli
from wan22.config import RequestError
from wan22.experts import Experts
from wan22.model import Block
from wan22.several import launch, watch
from wan22.several.watch import Member, News, Watchman
from wan22.signals import STOPPED
from wan22.vae import VideoVAE
from wan22.video import VideoWriter

TYPED = ["generate", "--ckpt_dir", str(TINY), "--size", "64*48", "--frame_num", "5", "--sample_steps", "4", "--prompt",
         "a ball", "--seed", "3", "--sample_shift", "3", "--device", "cpu", "--keep-latents",
         "--save-every", "0"]  # fmt: skip
LOW = "low_noise_model"
BLOCKS = 3 * 2  # calls a step: three blocks, two branches, on two ranks that share the tokens


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The latents of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    assert cli.main([*TYPED, "--output", str(folder / "v.mp4")]) == 0
    return load_file(folder / "v.latents.safetensors")["latents"]


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """The command line in several processes, with a fault in some: exit code, stdout, stderr, seconds."""
    monkeypatch.chdir(tmp_path)

    def main(*words, count=2, fault=lambda rank: None):
        output = tmp_path / "said"
        output.mkdir(exist_ok=True)
        for file in output.iterdir():
            file.unlink()
        forked = functools.partial(ForkedPopen, fault=fault, output=output)
        monkeypatch.setattr(launch, "Popen", forked)
        capfd.readouterr()
        start = time.monotonic()
        code = cli.main([*TYPED, "--gpus", str(count), *words])
        seconds = time.monotonic() - start
        texts = [(output / name).read_text() if (output / name).exists() else "" for name in ("stdout", "stderr")]
        own = capfd.readouterr()
        print(f"{seconds:.1f} s, exit {code}\n{texts[1]}{own.err}")
        return code, texts[0].strip(), texts[1] + own.err, seconds

    return main


def at_call(owner, name, number, act):
    """Replace a method by one that acts at its call of this number, from 0."""
    method, calls = getattr(owner, name), iter(range(1 << 30))

    def replacement(*args, **kwargs):
        if next(calls) == number:
            act()
        return method(*args, **kwargs)

    setattr(owner, name, replacement)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_with_a_state():
    """As where a step takes minutes: one that is over was written down in the next. Here it is over in 0.05 s."""
    end = time.monotonic() + 20
    while not list(Path().glob("*.state.safetensors")) and time.monotonic() < end:
        time.sleep(0.01)
    die()


def stop():
    os.kill(os.getpid(), signal.SIGSTOP)


def hang():
    time.sleep(600)


def run_out():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def fail():
    raise RequestError("weights.safetensors: ended while it was read")


def crash():
    raise ValueError("something else")


PLACES = {  # where, and how many steps are done by then
    "load": (lambda act: at_call(Experts, "get", 0, act), 0),
    "first expert": (lambda act: at_call(Block, "forward", BLOCKS + 2, act), 1),
    "switch": (lambda act: at_call(Experts, "get", 1, act), 2),
    "decode": (lambda act: at_call(VideoVAE, "_local", 1, act), 4),
    "write": (lambda act: at_call(VideoWriter, "write", 1, act), 4),
}


def one(rank, place, act):
    return lambda own: PLACES[place][0](act) if own == rank else None


@pytest.mark.parametrize(("place", "rank"), [
    ("load", 1), ("first expert", 0), ("first expert", 1), ("switch", 1), ("switch", 0), ("decode", 1), ("write", 0),
])  # fmt: skip
def test_killed(run, whole, tmp_path, place, rank):
    done = PLACES[place][1]
    may_lag = rank == 0 and 0 < done < 4
    act = die_with_a_state if may_lag else die
    code, out, err, seconds = run("--ulysses_size", "2", "--output", "v.mp4", fault=one(rank, place, act))
    assert (code, out) == (1, "")
    assert err.count("error:") == 1
    assert f"error: rank {rank} was killed by SIGKILL\n" in err
    assert seconds < 30
    assert not (tmp_path / "v.mp4").exists()
    # The state is written beside the next step: who is killed in that may have got no further than the last.
    goes_on(run, whole, tmp_path, {done, done - 1} if may_lag else {done})


def goes_on(run, whole, tmp_path, done, count=3):
    """The same command, on another number of processes."""
    code, out, err, _ = run("--output", "v.mp4", count=count)
    assert (code, out) == (0, "v.mp4")
    begun = re.findall(r"going on from step (\d) of 4", err)
    assert int(begun[0] if begun else 0) in done
    assert (load_file(tmp_path / "v.latents.safetensors")["latents"] - whole).abs().max() < 1e-4


@pytest.mark.parametrize(("act", "code", "said"), [
    (run_out, 1, "error: rank 1: out of memory in step 2, with the smallest placement: CUDA out of memory\n"),
    (fail, 2, "error: weights.safetensors: ended while it was read\n"),
    (crash, 1, "error: rank 1: ValueError: something else\n"),
])  # fmt: skip
def test_an_error_of_one_is_told_once(run, whole, tmp_path, act, code, said):
    words = ["--ulysses_size", "2", "--output", "v.mp4"]
    found, out, err, seconds = run(*words, fault=one(1, "first expert", act))
    assert (found, out, err.count("error:")) == (code, "", 1)
    assert said in err
    assert "kept in v.state.safetensors: step 1 of 4; the same command goes on" in err
    assert seconds < 30
    goes_on(run, whole, tmp_path, {1}, count=2)


@pytest.mark.parametrize(("act", "said"), [(hang, "rank 1 hangs"), (stop, "rank 1 does not answer any more")])
@pytest.mark.parametrize("place", ["first expert", "decode"])
def test_hanging(run, whole, tmp_path, monkeypatch, place, act, said):
    """As it is, a hang is found after 20 seconds, a stopped process after 12."""
    assert watch.STANDSTILL + watch.RESCUE < 30
    assert watch.SILENCE + watch.RESCUE < 30
    monkeypatch.setattr(watch, "STANDSTILL", 4.0)
    monkeypatch.setattr(watch, "SILENCE", 3.0)
    code, _, err, seconds = run("--output", "v.mp4", fault=one(1, place, act))
    assert (code, err.count("error:")) == (1, 1)
    assert f"error: {said}" in err
    assert seconds < 30
    assert (tmp_path / "v.state.safetensors").exists()


def test_a_slow_one_is_waited_for(run, tmp_path, monkeypatch):
    """Others that wait are no hang as long as somebody gets on."""
    monkeypatch.setattr(watch, "STANDSTILL", 2.5)

    def slowly():
        for _ in range(20):
            time.sleep(0.25)
            watch.tick()

    code, _, err, _ = run("--output", "v.mp4", fault=one(1, "switch", slowly))
    assert (code, "error" in err) == (0, False)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(run, tmp_path, number):
    parent = os.getpid()

    def ask(rank):
        if rank == 1:
            at_call(Block, "forward", BLOCKS + 2, lambda: os.kill(parent, number))

    code, _, err, seconds = run("--output", "v.mp4", "--sample_steps", "40", fault=ask)
    assert code == 128 + number
    assert ("error" in err, err.count("kept in v.state.safetensors")) == (False, 1)
    assert seconds < 30


# --- at the command line ---------------------------------------------------------------------------------------------
def test_what_cannot_work_is_one_line_and_starts_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "Popen", None)
    for words, said in ((["--gpus", "3", "--ulysses_size", "2"], "--ulysses_size 2: does not divide 3 processes"),
                        (["--gpus", "8", "--ulysses_size", "8"], "the model has 4 heads"),
                        (["--gpus", "2", "--offload", "block"], "--offload block"),
                        (["--dit_fsdp"], "--dit_fsdp needs several processes"),
                        (["--gpus", "0"], "--gpus")):  # fmt: skip
        assert cli.main([*TYPED, *words]) == 2
        err = capfd.readouterr().err
        assert said in err
        assert err.count("error:") == 1


def test_dry_run_says_the_mesh(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*TYPED, "--gpus", "4", "--dry-run"]) == 0
    assert "4 of cpu: guidance × 2, ulysses × 2" in capfd.readouterr().out


def processes(*words, cwd):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, *words]
    return subprocess.run(words, capture_output=True, text=True, cwd=cwd, env=environment, timeout=300)


def test_torchrun_as_published(whole, tmp_path):
    """The published line, every process of its own; then one that cannot work: one line, from one of them."""
    published = ["-m", "torch.distributed.run", "--nproc_per_node=2", str(ROOT / "generate.py"), "--task", "t2v-A14B",
                 *TYPED[1:], "--dit_fsdp", "--t5_fsdp", "--ulysses_size", "2", "--save_file", "v.mp4"]  # fmt: skip
    done = processes(*published, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["v.mp4"]
    assert "ulysses × 2; experts and text encoder sharded" in done.stderr
    assert (load_file(tmp_path / "v.latents.safetensors")["latents"] - whole).abs().max() < 1e-4
    done = processes(*published[:-1], "w.mp4", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("output")] == [f"{'output':<12}w.mp4"]
    done = processes(*published[:-1], "w.mp4", "--ring_size", "3", cwd=tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("error: --ring_size 3: does not divide 2 processes") == 1


def test_it_starts_itself(whole, tmp_path):
    done = processes("-m", "wan22", *TYPED, "--gpus", "2", "--output", "v.mp4", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"event": "finished"') == 1
    assert done.stdout.count('"event": "step"') == 4
    assert (load_file(tmp_path / "v.latents.safetensors")["latents"] - whole).abs().max() < 1e-4


# --- the watch itself ------------------------------------------------------------------------------------------------
def listened(*heard):
    """The verdict on these news, (seconds to wait before, news)."""
    told = []
    watchman = Watchman(2, "127.0.0.1", told.append)
    for wait, news in heard:
        time.sleep(wait)
        watchman.hear(news)
    assert watchman.ended.wait(10)
    assert len(told) == 1
    return told[0]


def test_the_best_explanation_is_told():
    cut, died = News("cut off", 0, "gloo: connection closed"), News("died", 1, "rank 1 was killed")
    assert listened((0, cut), (0.2, died)) == died
    own = News("failed", 1, "out of memory", ("smaller",), 3)
    assert listened((0, cut), (0.1, News("lost", 1, "rank 1 died")), (0.1, own)) == own
    assert listened((0, cut)) == cut  # better than nothing


def test_strangers_are_not_heard():
    import socket

    watchman = Watchman(1, "127.0.0.1", lambda news: None)
    with socket.create_connection(("127.0.0.1", watchman.port)) as stranger:
        stranger.sendall(b'{"token": "x", "rank": 0, "news": {"kind": "died"}}\nGET / HTTP/1.1\n\n')
    time.sleep(2)
    assert watchman.verdict is None
    watchman.hear(News("died", 0, "the end of this test"))
    assert watchman.ended.wait(5)


def test_a_good_bye_is_no_death():
    watchman = Watchman(1, "127.0.0.1", lambda news: None)
    Member(0, ("127.0.0.1", watchman.port), watchman.token).leave()
    time.sleep(2)
    assert watchman.verdict is None
    watchman.hear(News("died", 0, "the end of this test"))
    assert watchman.ended.wait(5)


# --- told to end -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_rank_that_waits_for_the_others_can_be_ended(number, tmp_path):
    """Its main thread is in a library's call that comes back after 30 minutes."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT)}  # fmt: skip
    with subprocess.Popen([sys.executable, "-m", "wan22", *TYPED], env=environment, cwd=tmp_path, text=True,
                          stderr=subprocess.PIPE) as waiting:  # fmt: skip
        for _ in range(600):  # until it listens for the others
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        start = time.monotonic()
        waiting.send_signal(number)
        said = waiting.communicate(timeout=20)[1]
    assert (waiting.returncode, said) == (128 + number, f"{STOPPED[128 + number]}\n")
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("seconds", [0.1, 1.0])  # while processes are started, while they import
def test_processes_that_are_only_starting_end_too(number, seconds, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    timer = threading.Timer(seconds, os.kill, (os.getpid(), number))
    timer.start()
    assert launch.launch(TYPED, 2) == 128 + number
    assert capfd.readouterr().err == f"{STOPPED[128 + number]}\n"
    assert list(tmp_path.iterdir()) == []
