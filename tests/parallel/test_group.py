"""A batch's worker of several processes: the same videos, one of them killed, and nothing left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from types import SimpleNamespace

import psutil
import pytest
import together
import torch
from conftest import ROOT, TINY
from safetensors.torch import load_file

from wan22 import batch, cli, cli_many, state
from wan22.checkpoint import open_checkpoint
from wan22.config import Placement, Request, RequestError, RunError
from wan22.many import claim, group, journal
from wan22.many.items import read_items
from wan22.many.local import LocalEngine, count_workers
from wan22.many.worker import Work, mesh_of
from wan22.options import Base, read_checkpoint
from wan22.parallel import Ranks
from wan22.pipeline import Pipeline
from wan22.plan import Sizes
from wan22.several import launch
from wan22.several.launch import Team
from wan22.several.mesh import Mesh
from wan22.several.watch import of_another

BASE = Base({}, {}, {})
SMALL = ["--ckpt_dir", str(TINY), "--device", "cpu", "--size", "64x48", "--frames", "5", "--steps", "6",
         "--shift", "3", "--save-every", "0", "--keep-latents"]  # fmt: skip
LINES = ["one ball --seed 3", "two --guidance 1 --seed 4", "three --seed 5"]


def run(folder, act=lambda event, data: None, gpus=2):
    """A batch of LINES; what was told, and the outcomes."""
    (folder.parent / "p.txt").write_text("\n".join(LINES))
    command = cli.typer.main.get_command(cli.app)
    params = command.commands["batch"].make_context("batch", ["x.txt", *cli.normalize(SMALL)[0]]).params
    flags = {**params, "prompt": None, "from_file": None}
    items, bad = read_items(folder.parent / "p.txt", flags, BASE, read_checkpoint(flags, BASE, "t2v-A14B"),
                            lambda words: cli_many.parse_line(command, words), seeds=[], repeat=1)  # fmt: skip
    jobs, bad = batch.plan_jobs(items, bad, flags, BASE, gpus=gpus)
    assert not bad
    told = []

    def tell(event, **data):
        told.append((event, data))
        act(event, data)

    outcomes = batch.Batch(jobs, folder, LocalEngine(["cpu"], Work(flags, BASE, folder, gpus=gpus)), tell).run([])
    return told, outcomes


def family():
    """All processes below this one that live, but for the one that Python starts to tidy up after it."""
    living = []
    for one in psutil.Process().children(recursive=True):
        try:
            words, status = " ".join(one.cmdline()), one.status()
        except psutil.Error:
            continue
        if status != psutil.STATUS_ZOMBIE and "resource_tracker" not in words:
            living.append(one)
    return living


def videos(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".mp4", ".safetensors")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a worker of two makes where nothing happens."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    told, outcomes = run(folder)
    assert [one.what for one in outcomes] == ["done"] * 3
    assert not any(event == "died" for event, _ in told)
    assert not family()
    return folder


def test_they_are_the_single_process_s(whole, tiny):
    pipe = Pipeline(tiny, placement=Placement("cpu"))
    for line in LINES:
        prompt, _, words = line.partition(" --")
        guidance = {"guidance_high": 1.0, "guidance_low": 1.0} if "guidance" in words else {}
        alone = pipe.generate(Request(prompt, width=64, height=48, num_frames=5, num_steps=6, shift=3.0,
                                      seed=int(words[-1]), **guidance))  # fmt: skip
        (file,) = whole.glob(f"{prompt.split()[0]}*.latents.safetensors")
        largest = (load_file(file)["latents"] - alone.latents).abs().max().item()
        print(f"{prompt}: largest difference {largest:.1e}")
        assert largest < 1e-4
        assert alone.latents.std() > 0.1


def test_one_of_them_is_killed(whole, tmp_path):
    """SIGKILL of rank 1 in an item, of rank 0 in another: they go on from their state, are made once, and have the same
    bits, as has the one between."""
    ranks, killed = {"one-ball": 1, "three": 0}, []

    def act(event, data):
        rank = ranks.get(str(data.get("name")).rpartition("-")[0])
        if event == "step" and data["step"] == 4 and rank is not None and rank not in killed:
            (first,) = [one for one in family() if one.ppid() == os.getpid()]
            others = [one for one in family() if one.ppid() == first.pid]
            assert len(others) == 1
            killed.append(rank)
            os.kill((first, *others)[rank].pid, signal.SIGKILL)

    told, outcomes = run(tmp_path / "out", act)
    assert killed == [1, 0]
    assert [one.what for one in outcomes] == ["done"] * 3
    assert Counter(data["name"] for event, data in told if event == "done").most_common(1)[0][1] == 1
    assert [data["why"] for event, data in told if event == "died"] == ["rank 1 was killed by SIGKILL", "exit code -9"]
    resumed = [data["resumed"] for event, data in told if "resumed" in data]
    assert len(resumed) == 2
    assert min(resumed) >= 2
    assert videos(tmp_path / "out") == videos(whole)
    left = {path.name for path in (tmp_path / "out").iterdir()} - set(videos(whole))
    assert left == {journal.NAME}
    assert not family()


@pytest.mark.skipif(sys.platform != "linux", reason="needs process groups")
def test_ctrl_c_reaches_all_and_the_state_is_kept(tmp_path):
    """As a terminal sends it: to every process of the group at once."""
    code = os.fork()
    if not code:
        status = 70
        try:
            os.setpgid(0, 0)
            signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
            run(tmp_path / "out", lambda event, data: event == "step" and data["step"] == 3 and os.killpg(0, 2))
        except SystemExit as error:
            status = error.code
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(code, 0)[1]) == 130
    time.sleep(0.5)
    assert len(list((tmp_path / "out").glob("*.state.safetensors"))) == 1
    assert not list((tmp_path / "out").glob(".*"))
    assert not [one for one in psutil.process_iter(["cmdline", "status"])
                if str(tmp_path) in " ".join(one.info["cmdline"] or []) and one.info["status"] != "zombie"]  # fmt: skip


def test_workers_of_several_gpus(monkeypatch):
    """Eight GPUs are four workers of two, each of which sees its own."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert count_workers(None, Placement(), 2) == ["0,1", "2,3", "4,5", "6,7"]
    assert count_workers(1, Placement("cuda"), 3) == ["0,1,2"]
    assert count_workers(None, Placement(), 8) == ["0,1,2,3,4,5,6,7"]
    assert count_workers(2, Placement("cpu"), 2) == ["cpu", "cpu"]
    with pytest.raises(RequestError, match="there are 4 workers for them, 2 GPUs each"):
        count_workers(5, Placement(), 2)
    with pytest.raises(RequestError, match="--gpus-per-worker 9: there are 8 here"):
        count_workers(None, Placement(), 9)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7, 3,GPU-1234")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert count_workers(None, Placement(), 2) == ["7,3"]

    started = []
    monkeypatch.setattr("wan22.many.local.LocalWorker", started.append)
    flags = {"precision": None}
    LocalEngine(["7,3"], Work(flags, BASE, TINY, gpus=2)).start(0, [])
    LocalEngine(["cuda:1"], Work(flags, BASE, TINY)).start(0, [])
    assert [(one.device, one.cards) for one in started] == [("cuda", "7,3"), ("cuda:1", None)]


def test_one_mesh_for_all(tiny):
    """Whatever an item's guidance: else who takes it up again would round otherwise."""
    sizes = Sizes.of(tiny)
    small = Request("x", width=64, height=48, num_frames=5)
    assert str(mesh_of(Placement(), 2, small, sizes)[0]) == "guidance × 2"
    assert mesh_of(Placement(), 2, Request("x", guidance_high=1, guidance_low=1), sizes)[0].guidance == 2
    assert str(mesh_of(Placement(ulysses_size=2), 2, small, sizes)[0]) == "ulysses × 2"
    with pytest.raises(RequestError, match="the video has 24 tokens"):
        mesh_of(Placement(), 25, small, sizes)


@pytest.mark.parametrize(("words", "said"), [
    (["--gpus-per-worker", "8", "--ulysses_size", "8"], "the model has 4 heads"),
    (["--gpus-per-worker", "3", "--ulysses_size", "2"], "--ulysses_size 2: does not divide 3 processes"),
    (["--ulysses_size", "2"], "--ulysses_size needs several processes"),
    (["--gpus-per-worker", "2", "--offload", "block"], "--offload block: for one GPU alone; there are 2"),
    (["--gpus-per-worker", "2", "--device", "cuda:1"], "--device cuda:1: there are 2 processes"),
    (["--gpus-per-worker", "2", "--dit_fsdp", "--dtype", "fp8"], "--dit_fsdp goes with no fp8 weights"),
    (["--gpus-per-worker", "0"], "--gpus-per-worker"),
])  # fmt: skip
def test_what_cannot_be(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a\n")
    assert cli.main(["batch", "p.txt", *SMALL, *words]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("error:") == 1


def _begin(rank, world, folder):
    """What two ranks hear of an output that another process makes, of a folder that is none, and of a free name."""
    pipe = Pipeline(open_checkpoint(TINY), placement=Placement("cpu"),
                    ranks=Ranks(Team(rank, world, rank, world), Mesh(2), torch.device("cpu")))  # fmt: skip
    heard = []
    for name in ("held.mp4", "file/v.mp4", "free.mp4"):
        try:
            _, state = pipe.begin(Request("x", width=64, height=48, num_frames=5, seed=1), folder / name, True)
            with state:
                heard.append(str(state.output.name))
        except (RequestError, RunError, OSError) as error:
            heard.append(type(error).__name__)
    return heard


def test_what_the_first_cannot_begin_holds_up_none(tmp_path):
    """They hear of it together, and go on with the next."""
    (tmp_path / "file").write_text("")
    held = claim.take(state.claim_path(tmp_path / "held.mp4"))
    try:
        assert together.run(2, _begin, tmp_path) == [["Busy", "RunError", "free.mp4"]] * 2
    finally:
        held.release()


class _Pipe:
    """To a worker that never gets that far."""

    def __init__(self):
        self.said = []

    def send(self, said):
        self.said.append(said)

    def recv(self):
        raise AssertionError


def test_a_group_that_does_not_come_together(tmp_path, monkeypatch):
    """A port that was taken since, say: the worker dies, and is no error of the batch; those beside it go."""
    def refuse(team):
        raise RunError("rank 0 of 2 did not find the others")

    monkeypatch.setattr("wan22.parallel.meet", refuse)
    for name in ("MASTER_ADDR", "MASTER_PORT", launch.WATCH):
        monkeypatch.setenv(name, "")  # and as they were, after
    pipe = _Pipe()
    with pytest.raises(SystemExit):
        group.live_together(pipe, Work({}, BASE, tmp_path, gpus=2))
    assert pipe.said == [("dying", {"why": "rank 0 of 2 did not find the others"})]
    end = time.monotonic() + 5
    while family() and time.monotonic() < end:
        time.sleep(0.05)
    assert not family()


ENCODER = """#!{python}
import re, struct, sys
while sys.stdin.buffer.read(1 << 20):
    pass
(file,) = [word for word in sys.argv if word.endswith("record.txt")]
text = re.sub(r"\\\\(.)", r"\\1", open(file).read().partition("comment=")[2][:-1], flags=re.DOTALL).encode()
box = lambda kind, inside: struct.pack(">I", 8 + len(inside)) + kind + inside
comment = box(b"\\xa9cmt", box(b"data", bytes([0, 0, 0, 1, 0, 0, 0, 0]) + text))
moov = box(b"moov", box(b"udta", box(b"meta", bytes(4) + box(b"ilst", comment))))
open(sys.argv[-1], "wb").write(box(b"ftyp", b"isom") + moov)
"""


def encoder_in(folder):
    """A folder for PYTHONPATH with a stand-in for ffmpeg, which machines with GPUs need not have: it keeps the record
    and no frames, since latents are what is compared."""
    folder.mkdir()
    (folder / "ffmpeg").write_text(ENCODER.format(python=sys.executable))
    (folder / "ffmpeg").chmod(0o755)
    (folder / "imageio_ffmpeg.py").write_text(f"def get_ffmpeg_exe():\n    return {str(folder / 'ffmpeg')!r}\n")
    return str(folder)


@pytest.mark.multigpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_worker_of_two_gpus(tmp_path, monkeypatch):
    """The videos of `generate --gpus 2` bit for bit, and of one GPU to rounding; one rank is killed on the way."""
    path = [encoder_in(tmp_path / "site"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    words = ["--ckpt_dir", str(TINY), "--size", "128*96", "--frames", "9", "--steps", "24", "--shift", "5",
             "--attention", "torch", "--dtype", "float32", "--keep-latents", "--save-every", "0"]  # fmt: skip
    (tmp_path / "p.txt").write_text("a ball --seed 3\na cube --seed 4\n")
    start = [sys.executable, "-m", "wan22"]
    command = [*start, "batch", "p.txt", *words, "--workers", "1", "--gpus-per-worker", "2", "--output", "out"]
    began = time.monotonic()
    with subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, text=True, cwd=tmp_path) as batched:
        killed = False
        for line in batched.stdout:
            event = json.loads(line)
            if event["event"] == "start" and not killed:
                first = psutil.Process(event["worker"])
            if event["event"] == "step" and event["step"] == 8 and not killed:
                killed = True
                next(one for one in first.children() if "spawn_main" in " ".join(one.cmdline())).kill()
        assert (batched.wait(), killed) == (0, True)
    print(f"the batch: {time.monotonic() - began:.0f} s")
    asked = {
        (prompt, name): [*more, "--prompt", prompt, "--seed", seed, "--output", str(tmp_path / f"{name}-{seed}.png")]
        for prompt, seed in (("a ball", "3"), ("a cube", "4"))
        for name, more in (("two", ["--gpus", "2"]), ("one", []))
    }
    others = [subprocess.Popen([*start, "generate", *words, *more]) for more in asked.values()]  # at once
    assert [other.wait() for other in others] == [0] * len(asked)
    for (prompt, name), more in asked.items():
        (made,) = (tmp_path / "out").glob(f"{prompt.replace(' ', '-')}-*.latents.safetensors")
        other = more[-1].replace(".png", ".latents.safetensors")
        largest = (load_file(made)["latents"] - load_file(other)["latents"]).abs().max()
        print(f"{prompt}, {name}: largest difference {largest:.1e}")
        assert largest < (1e-3 if name == "one" else 1e-6)


def test_whose_fault():
    """A message that did not come through says nothing of its cause; what ran out of memory does."""
    assert of_another(RuntimeError("[gloo/transport/tcp/pair.cc:537] Connection reset by peer"))
    out = type("OutOfMemoryError", (RuntimeError,), {})("Connection")
    for own in (RuntimeError("a shape"), RequestError("a pipe is no size"), out, SimpleNamespace()):
        assert not of_another(own)
