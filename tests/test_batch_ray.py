"""The engine `ray` on a real cluster of two nodes on this machine, one of which is killed."""

import contextlib
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from conftest import ROOT, TINY
from safetensors.torch import load_file

import wan22
from wan22 import cli
from wan22.config import Placement, Precision, Request, RequestError
from wan22.many import journal
from wan22.many import ray_cluster as batch_ray
from wan22.many.worker import Work
from wan22.options import Base
from wan22.pipeline import Pipeline

ray = pytest.importorskip("ray")

SMALL = ["--ckpt_dir", str(TINY), "--device", "cpu", "--size", "64x48", "--frames", "5", "--steps", "4"]


@pytest.fixture
def cluster(monkeypatch):
    """Two nodes with a CPU each, the first of them the head."""
    from ray.cluster_utils import Cluster

    for name, value in (("RAY_USAGE_STATS_ENABLED", "0"), ("OMP_NUM_THREADS", "1"), ("PYTHONPATH", str(ROOT)),
                        ("RAY_enable_metrics_collection", "0")):  # fmt: skip
        monkeypatch.setenv(name, value)
    small = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    made = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
    try:
        made.second = made.add_node(**small)
        made.wait_for_nodes()
        yield made
    finally:
        gc.collect()  # handles and references, while there is somebody to tell
        ray.shutdown()
        made.shutdown()


def test_what_cannot_be(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a")
    for words, said in ((["--engine", "x"], "known: local, ray"), (["--ray-address", "a:1"], "is for --engine ray"),
                        (["--engine", "ray", "--ray-address", "ray://a:1"], "ray job submit"),
                        (["--engine", "ray", "--ray-address", "127.0.0.1:1"], "no Ray cluster")):  # fmt: skip
        assert cli.main(["batch", "p.txt", *SMALL, *words]) == 2
        assert said in capsys.readouterr().err


def test_a_node_that_is_another_place(tmp_path, monkeypatch):
    """What an actor finds wrong where it is: another version, or another folder under the output's name."""
    monkeypatch.setattr(batch_ray, "SEEN", 0.0)
    work = Work({}, Base({}, {}, {}), tmp_path)
    here = batch_ray.Home(wan22.__version__, tmp_path)
    assert "is not where the batch was begun" in batch_ray._elsewhere(work, here)["message"]
    log = journal.Journal(tmp_path)
    log.add("begin", run="another")
    assert "all nodes share" in batch_ray._elsewhere(work, here)["hint"]
    log.add("begin", run=work.run)
    assert batch_ray._elsewhere(work, here) is None
    assert "version" in batch_ray._elsewhere(work, batch_ray.Home("0.0.1", tmp_path))["message"]


def test_the_line_that_matters():
    told = "The actor died because of an error\n  File x, line 3\nModuleNotFoundError: No module named 'wan22'\n"
    assert batch_ray._last_line(RuntimeError(told)) == "ModuleNotFoundError: No module named 'wan22'"
    assert batch_ray._last_line(RuntimeError("one\ntwo\n")) == "two"


def test_a_node_is_killed_and_a_poisonous_item_set_aside(cluster, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("\n".join(["poison", *"abcdef", "bad --size 65x48"]))
    folder = tmp_path / "out"
    killed = []

    def watch():
        """Kill whoever takes up the poison, and the second node once two items are made."""
        seen = 0
        while True:
            events = list(journal.read(folder)) if folder.exists() else []
            for event in events[seen:]:
                if event["event"] == "start" and event["name"].startswith("poison"):
                    os.kill(int(event["worker"].split()[1]), signal.SIGKILL)
                if event["event"] == "end":
                    return
            seen = len(events)
            if not killed and sum(event["event"] == "done" for event in events) >= 2:
                cluster.remove_node(cluster.second, allow_graceful=False)
                killed.append(time.time())
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    words = ["batch", "p.txt", "--output", "out", *SMALL, "--engine", "ray", "--json"]
    words += ["--ray-address", cluster.address, "--save-every", "0"]
    start = time.perf_counter()
    code = cli.main(words)
    seconds = time.perf_counter() - start
    watcher.join(60)
    out, err = capsys.readouterr()
    print(f"{seconds:.1f} s")
    events = [json.loads(line) for line in out.splitlines()]  # and nothing else on stdout
    assert (code, bool(killed)) == (1, True), err
    told = Counter(event["event"] for event in events)
    assert (told["done"] + told["there"], told["failed"], told["bad"]) == (6, 1, 1)
    done = Counter(event["name"] for event in events if event["event"] in ("done", "there"))
    assert set(done.values()) == {1}
    failed = next(event for event in events if event["event"] == "failed")
    assert failed["name"].startswith("poison")
    assert "workers died over it" in failed["error"]
    assert len(list(folder.glob("*.mp4"))) == 6
    left = sorted(path.name for path in folder.iterdir() if path.suffix != ".mp4" and "poison" not in path.name)
    assert left == ["batch.jsonl", "index.html"]


def test_a_worker_of_several_processes(cluster, tmp_path, monkeypatch, capsys, tiny):
    """An actor and a process beside it make each video together; that one is killed, and nothing stays behind."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("one --seed 3\ntwo --seed 4\n")
    folder, seen, killed = tmp_path / "out", set(), []

    def watch():
        """Find the processes beside those actors that began an item; kill the first, once there is a state."""
        events = []
        while not any(event["event"] == "end" for event in events):
            events = list(journal.read(folder))
            for event in events:
                with contextlib.suppress(psutil.Error):
                    if event["event"] == "start":
                        children = psutil.Process(int(event["worker"].split()[1])).children()
                        seen.update(one for one in children if "spawn_main" in " ".join(one.cmdline()))
            if not killed and seen and list(folder.glob("*.state.safetensors")):
                killed.extend(seen)
                killed[0].kill()
            time.sleep(0.005)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    words = ["batch", "p.txt", "--output", "out", *SMALL, "--shift", "3", "--steps", "40", "--engine", "ray", "--json"]
    words += ["--ray-address", cluster.address, "--save-every", "0", "--workers", "1", "--gpus-per-worker", "2"]
    code = cli.main([*words, "--keep-latents"])
    out, err = capsys.readouterr()
    events = [json.loads(line) for line in out.splitlines()]
    assert (code, len(killed)) == (0, 1), err
    told = Counter(event["event"] for event in events)
    assert (told["done"], told["died"], told["failed"]) == (2, 1, 0)
    assert "rank 1" in next(event["why"] for event in events if event["event"] == "died")
    assert next(event["resumed"] for event in events if "resumed" in event) >= 1
    for prompt, seed in (("one", 3), ("two", 4)):
        request = Request(prompt, width=64, height=48, num_frames=5, num_steps=40, shift=3.0, seed=seed)
        alone = Pipeline(tiny, placement=Placement("cpu")).generate(request).latents
        (file,) = folder.glob(f"{prompt}-*.latents.safetensors")
        assert (load_file(file)["latents"] - alone).abs().max() < 1e-4
    assert sorted(path.name for path in folder.iterdir() if path.stem.count("-") == 0) == ["batch.jsonl", "index.html"]
    watcher.join(10)
    end = time.monotonic() + 10
    while any(map(alive, seen)) and time.monotonic() < end:
        time.sleep(0.1)
    assert len(seen) == 2
    assert not any(map(alive, seen))


def alive(process):
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def test_one_precision_for_all_nodes(tmp_path):
    """A preset is what the cluster's cards make of it, for the names here and for every worker; without one to ask, all
    there is."""

    def cluster_of(answer):
        def get(said, timeout):
            if answer is None:
                raise ray.exceptions.GetTimeoutError
            return answer

        task = SimpleNamespace(remote=lambda: None)
        return SimpleNamespace(remote=lambda **asked: lambda function: task, get=get, cancel=lambda said, force: None,
                               exceptions=ray.exceptions)  # fmt: skip

    def work(device, precision):
        flags = dict.fromkeys(["dtype", "attention", "scope", "step_cache", "vae_dtype", "device"])
        flags |= {"precision": precision, "convert_model_dtype": False}
        return Work(flags, Base({}, {}, {}), tmp_path, device=device)

    for answer, weights, attention in (((8, 0), "int8", "int8-bf16"), ((9, 0), "fp8", "int8"), (None, "fp8", "int8")):
        found = batch_ray._definite(cluster_of(answer), work("cuda:0", "high"))
        assert (found.base.precision["weights"], found.base.precision["attention"]) == (weights, attention)
        assert found.flags["precision"] is None
    assert batch_ray._definite(None, work("cpu", None)).base.precision == Precision().to_dict()
    with pytest.raises(RequestError, match="needs a GPU"):
        batch_ray._definite(None, work("cpu", "high"))


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_slurm_multinode_sh(tmp_path):
    """With SLURM's variables and commands faked: a cluster of two nodes, a batch on it, and nothing running after."""
    folder = tmp_path / "bin"
    folder.mkdir()
    skip_options = 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"'
    for name, body in {"srun": f'echo "$@" >>srun.log; {skip_options}', "hostname": 'echo "127.0.0.1 10.1.1.1"',
                       "wan22": f'exec {sys.executable} -m wan22 "$@"'}.items():  # fmt: skip
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "SLURM_JOB_ID": "4711",
                   "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_ON_NODE": "1", "SLURMD_NODENAME": "node1"}  # fmt: skip
    (tmp_path / "p.txt").write_text("a\nb\n")
    command = ["bash", str(ROOT / "scripts" / "slurm_multinode.sh"), "p.txt", "--output", "out", *SMALL]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "2 of 2 nodes" in result.stderr
    assert len(result.stdout.split()) == len(list((tmp_path / "out").glob("*.mp4"))) == 2
    assert (tmp_path / "srun.log").read_text().startswith("--nodes=1 --ntasks=1 --exclude=node1 ray start --address=")
    workers = {event["worker"] for event in journal.read(tmp_path / "out") if event["event"] == "start"}
    assert len(workers) <= 2
    def left():
        lines = (" ".join(one.info["cmdline"] or []) for one in psutil.process_iter(["cmdline"]))
        return [line for line in lines if f":{20000 + 4711}" in line]

    end = time.monotonic() + 30  # Ray's helpers end after those they help
    while left() and time.monotonic() < end:
        time.sleep(0.2)
    assert left() == []
