"""What a run needs is known before anything is loaded; what does not fit is refused at once, naming what would."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, TINY

from wan22 import cli, machine, plan
from wan22.checkpoint import open_checkpoint
from wan22.config import GPU_RESERVE, DoesNotFit, Placement, Precision, Request, RequestError, parse_bytes
from wan22.experts import Experts
from wan22.load import empty_expert
from wan22.lora import Adapters
from wan22.machine import Room
from wan22.model import TransformerConfig, WanTransformer
from wan22.plan import as_text, make_plan, pick_tiles, require
from wan22.residency.memory import Memory
from wan22.several.mesh import Shares
from wan22.sizes import Sizes, block_moments, lasting_terms, reading_terms, text_terms, total, weight_terms

GIB = 1 << 30
PUBLISHED = Sizes.published()
HOST = Room(256 * GIB, 200 * GIB)
CARD = 80 * GIB
SIZES = {"720p": Request("x"), "480p": Request("x", width=832, height=480)}


def made(gpu, host=HOST, request=SIZES["720p"], **placement):
    room = Room(CARD, int(gpu * GIB), "a card") if gpu else None
    return make_plan(request, Precision("bf16"), Placement(**placement), PUBLISHED, room, host)


def test_both_branches_count_wherever_there_is_guidance():
    name, plain = "keys and values of prompts", Request("x", guidance_high=1.0, guidance_low=1.0)
    one = lasting_terms(plain, PUBLISHED, 2)[name]
    for request in (
        replace(plain, lead_steps=3), replace(plain, guidance_low=2.0), replace(plain, guidance_high=0.5), Request("x")
    ):
        assert lasting_terms(request, PUBLISHED, 2)[name] == 2 * one
    assert lasting_terms(replace(plain, lead_steps=3, guidance_lead=1.0), PUBLISHED, 2)[name] == one


def test_what_would_fit_is_asked_for_each_of_several():
    card, host = Room(CARD, 40 * GIB, "a card"), Room(HOST.total, 30 * GIB)
    asked = SIZES["720p"], Precision("float32"), Placement(), PUBLISHED, card, host
    assert require(*asked).chosen  # by one, from disk
    for gib, hint in ((30, "this would fit: --dtype bf16, with --offload auto"),
                      (7, "no size of video would fit; see: wan22 plan")):  # fmt: skip
        with pytest.raises(DoesNotFit) as refused:
            require(*asked[:-1], Room(HOST.total, gib * GIB), Shares(world=4, sequence=2, processes=4))
        assert refused.value.hint == hint


def test_published_sizes():
    """Against the model itself, and the published files' own figures."""
    config = json.loads((ROOT / "configs/Wan2.2-T2V-A14B/high_noise_model/config.json").read_text())
    with torch.device("meta"):
        for item, dtype in ((4, torch.float32), (2, torch.bfloat16)):
            model = WanTransformer(TransformerConfig(**{k: v for k, v in config.items() if k in
                                                        TransformerConfig.__dataclass_fields__}), dtype)  # fmt: skip
            assert PUBLISHED.expert_bytes(item) == sum(tensor.nbytes for tensor in model.state_dict().values())
    assert PUBLISHED.expert_bytes(4) == 57_153_966_336
    assert (PUBLISHED.num_layers, PUBLISHED.files) == (40, 126_199_333_241)


def test_sizes_of_a_checkpoint(tiny):
    sizes = Sizes.of(tiny)
    for item, dtype in ((4, torch.float32), (2, torch.bfloat16)):
        state = empty_expert(tiny.experts["high_noise_model"], dtype).state_dict()
        assert sizes.expert_bytes(item) == sum(tensor.nbytes for tensor in state.values())


def test_weights_as_predicted(tiny):
    """The counting allocator's peak, but for what aligning the pieces adds."""
    sizes, shapes = Sizes.of(tiny), tiny.experts["high_noise_model"].tensors.shapes
    for option in make_plan(SIZES["480p"], Precision("float32"), Placement(), sizes, None, HOST).options:
        memory = Memory(torch.device("cpu"), has_host=True)
        experts = Experts(tiny, torch.float32, memory.device, Adapters(shapes, [], TINY), [option.residency], memory)
        for name in tiny.experts:
            experts.get(name)
        assert 0 <= memory.on_device.peak / total(weight_terms(option.residency, sizes, 4)) - 1 < 0.01


@pytest.mark.parametrize("size", SIZES)
def test_what_the_issue_asks_for(size):
    """720p in 16 GiB, 480p in 8; both experts on one 80 GiB card."""
    request = SIZES[size]
    assert made(79, request=request).chosen.residency.kind == "none"
    assert made(40, request=request).chosen.residency.kind == "expert"
    small = made({"720p": 16, "480p": 8}[size], request=request)
    assert small.chosen.residency.kind == "block"
    assert made(16, Room(16 * GIB, 15 * GIB), request).chosen.residency.kind == "disk"
    assert made(2, request=request).chosen is None
    assert made(79, request=request, offload="block").chosen.residency.resident_blocks == 38


def test_less_memory_never_needs_more():
    peaks = [option.peak("denoise") for option in made(24).options]
    assert peaks == sorted(peaks, reverse=True)
    for gpu in (10, 12, 16, 24, 32, 48, 64):
        chosen = made(gpu).chosen
        assert chosen is None or chosen.gpu_bytes <= gpu * GIB
    assert made(80, gpu_memory_limit=16 * GIB).chosen == made(16).chosen


def test_terms():
    """By hand, for 720p in bf16: 75,600 tokens of 5120."""
    assert plan.tokens_of(SIZES["720p"]) == 75_600
    moments = block_moments(75_600, PUBLISHED, 2, fused=True)
    assert total(moments["attention"]) == (4 + 8 * 2) * 75_600 * 5120
    assert max(moments, key=lambda name: total(moments[name])) == "attention"
    assert lasting_terms(SIZES["720p"], PUBLISHED, 2)["keys and values of prompts"] == 2 * 40 * 2 * 512 * 5120 * 2


def test_tiles_only_when_needed():
    shape = SIZES["720p"].latent_shape
    assert [pick_tiles(shape, PUBLISHED, gib * GIB) for gib in (40, 12, 8)] == [(1, 1), (1, 2), (2, 2)]


def test_the_ladder_goes_down():
    ladder = made(79).ladder
    assert [rung.kind for rung in ladder] == ["none", "expert", "block", "block", "disk", "disk"]
    # A small host has room for the few blocks that do not stay on a large card, and not for all of them.
    short = made(79, Room(8 * GIB, 8 * GIB)).ladder
    assert [(rung.kind, rung.resident_blocks) for rung in short[2:]] == [("block", 38), ("disk", 38), ("disk", 0)]


def test_what_does_not_fit_is_told_with_what_would():
    def refused(gpu, **placement):
        with pytest.raises(DoesNotFit) as error:
            require(SIZES["720p"], Precision(), Placement(**placement), PUBLISHED, Room(CARD, gpu * GIB), HOST)
        assert error.value.exit_code == 3
        return f"{error.value} {error.value.hint}"

    assert "would fit: --offload block" in refused(24, offload="none")
    assert "would fit: --size 1280x720 --frames 49" in refused(9)
    assert "no size" in refused(1)


def test_a_host_of_16_gib_without_a_gpu():
    """Weights are float32 there unless asked for otherwise: the text encoder alone has 21.5 GiB then."""
    host, request = Room(16 * GIB, 16 * GIB), SIZES["480p"]
    with pytest.raises(DoesNotFit) as error:
        require(request, Precision(), Placement("cpu"), PUBLISHED, None, host)
    assert error.value.hint == "this would fit: --dtype bf16, with --offload auto"
    found = require(request, Precision("bf16"), Placement("cpu"), PUBLISHED, None, host)
    assert found.chosen.residency.kind == "disk"
    assert found.chosen.host_bytes < 16 * GIB
    assert "text encoder on the CPU" in plan.as_text(found, request, PUBLISHED)


@pytest.mark.parametrize(("text", "amount"), [
    ("24GiB", 24 * GIB), ("24G", 24 * GIB), ("24GB", 24 * 10**9), ("25000MiB", 25000 << 20), ("1.5g", 3 * GIB // 2),
    ("4096", 4096),
])  # fmt: skip
def test_amounts(text, amount):
    assert parse_bytes("--x", text) == amount


@pytest.mark.parametrize("text", ["", "much", "24XB", "-1GiB", "0GiB"])
def test_no_amounts(text):
    with pytest.raises(RequestError, match="--x"):
        parse_bytes("--x", text)


# --- the machine -----------------------------------------------------------------------------------------------------
def write(root, **files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_host_memory_by_control_groups(tmp_path):
    write(tmp_path, **{"proc/meminfo": "MemTotal: 1000 kB\nMemFree: 10 kB\nMemAvailable: 900 kB\n"})
    assert machine.host_memory(tmp_path) == Room(1000 << 10, 900 << 10)
    group = "sys/fs/cgroup/a/b/memory"
    write(tmp_path, **{"proc/self/cgroup": "0::/a/b\n", f"{group}.max": "max\n", f"{group}.current": "5\n",
                       f"{group}.stat": "", "sys/fs/cgroup/a/memory.max": "5000\n",
                       "sys/fs/cgroup/a/memory.current": "3000\n",
                       "sys/fs/cgroup/a/memory.stat": "anon 1\ninactive_file 500\n"})  # fmt: skip
    assert machine.host_memory(tmp_path) == Room(5000, 2500, "control group")
    old = "sys/fs/cgroup/memory/x/memory"
    write(tmp_path, **{"proc/self/cgroup": "4:memory:/x\n3:cpu:/\n", f"{old}.limit_in_bytes": "4000\n",
                       f"{old}.usage_in_bytes": "3500\n", f"{old}.stat": "total_inactive_file 100\n"})  # fmt: skip
    assert machine.host_memory(tmp_path).free == 600
    # Weights that were read twice are active; a program's own mapped pages are not to be counted on.
    write(tmp_path, **{f"{old}.stat": "total_inactive_file 100\ntotal_active_file 3000\ntotal_mapped_file 200\n"})
    assert machine.host_memory(tmp_path).free == 500 + 2900


@pytest.mark.parametrize(("own", "mount", "folder"), [
    # Version 1 in a container, whose tree begins at its own group; a group made in there; all controllers in one tree.
    ("4:memory:/docker/c1\n", "30 25 0:26 /docker/c1 /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory", "memory"),
    ("4:memory:/docker/c1/job\n", "30 25 0:26 /docker/c1 /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory",
     "memory/job"),
    ("4:cpu,memory:/job\n", "30 25 0:26 / /sys/fs/cgroup/all rw - cgroup cgroup rw,cpu,memory", "all/job"),
    # Beside version 2's tree, which has no memory controller then.
    ("4:memory:/job\n0::/\n", "29 25 0:25 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
     "30 25 0:26 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory", "memory/job"),
])  # fmt: skip
def test_the_tree_of_control_groups(tmp_path, own, mount, folder):
    group = f"sys/fs/cgroup/{folder}/memory"
    write(tmp_path, **{"proc/meminfo": "MemTotal: 1000 kB\nMemFree: 10 kB\nMemAvailable: 900 kB\n",
                       "proc/self/cgroup": own, "proc/self/mountinfo": f"{mount}\n", f"{group}.stat": "",
                       f"{group}.limit_in_bytes": "4000\n", f"{group}.usage_in_bytes": "3500\n"})  # fmt: skip
    assert machine.host_memory(tmp_path) == Room(4000, 500, "control group")


def test_the_tree_of_control_groups_version_2(tmp_path):
    group = "sys/fs/cgroup/job/memory"
    write(tmp_path, **{"proc/meminfo": "MemTotal: 1000 kB\nMemFree: 10 kB\nMemAvailable: 900 kB\n",
                       "proc/self/cgroup": "0::/kubepods/pod1/job\n",
                       "proc/self/mountinfo": "29 25 0:25 /kubepods/pod1 /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
                       f"{group}.stat": "file_mapped 30\ninactive_file 10\n", f"{group}.max": "4000\n",
                       f"{group}.current": "3500\n"})  # fmt: skip
    assert machine.host_memory(tmp_path) == Room(4000, 500, "control group")


def test_nvidia_smi(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 81559, 80000, NVIDIA H100 80GB HBM3\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(machine, "_by_nvml", lambda card: None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert machine.gpu_memory() == Room(81559 << 20, 80000 << 20, "NVIDIA H100 80GB HBM3")
    for hidden in ("", "-1", "0"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert machine.gpu_memory("cuda:1") is None


def python(script, *words):
    command = [sys.executable, "-c", script, *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


# --- the command -----------------------------------------------------------------------------------------------------
def test_the_command_is_quick_and_brings_no_torch():
    script = ("import sys, time; from wan22.cli import main; code = main(sys.argv[1:]); "
              "print(time.process_time(), file=sys.stderr); "
              "sys.exit(9 if 'torch' in sys.modules or 'numpy' in sys.modules else code)")  # fmt: skip
    words = ["plan", "--gpu-memory", "24GiB", "--host-memory", "64GiB"]
    seconds = []
    for _ in range(3):
        result = python(script, *words)
        assert result.returncode == 0, result.stderr
        seconds.append(float(result.stderr))
    print(f"wan22 plan: {min(seconds):.2f} s\n{result.stdout}")
    assert min(seconds) < 0.5  # of a processor: other work on the machine does not count
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "block  " in next(line for line in result.stdout.splitlines() if "taken" in line)


def test_exit_3_and_json(capsys):
    assert cli.main(["plan", "--gpu-memory", "4GiB", "--host-memory", "64GiB", "--json"]) == 3
    table = json.loads(capsys.readouterr().out)
    assert table["chosen"] is None
    assert [option["offload"] for option in table["options"]] == ["none", "expert", "block", "disk"]
    assert cli.main(["plan", "--gpu-memory", "much"]) == 2


def test_a_mesh_that_is_asked_for(capsys):
    """Each flag that divides the work or the weights, as `generate` takes it, shows in the plan."""
    words = ["plan", "--gpu-memory", "80GiB", "--host-memory", "200GiB", "--gpus", "4"]

    def phases(*more):
        assert cli.main([*words, "--json", *more]) == 0
        table = json.loads(capsys.readouterr().out)["options"][0]["phases"]
        return {name: sum(terms.values()) for name, terms in table.items()}

    assert phases("--t5-fsdp")["text"] < 0.6 * phases()["text"]
    assert phases("--ulysses-size", "4")["denoise"] < phases()["denoise"]
    for asked, said in ((["--ulysses-size", "4"], "ulysses × 4"), (["--ring-size", "2"], "ring × 2")):
        assert cli.main([*words, *asked]) == 0
        assert said in capsys.readouterr().out.splitlines()[0]
    assert cli.main([*words, "--ulysses-size", "3"]) == 2
    assert cli.main([*words, "--t5-fsdp", "--t5-cpu"]) == 2


def test_generate_refuses_before_torch(tiny):
    script = ("import sys\nfrom wan22 import machine, plan\nplan.host_memory = lambda: machine.Room(1000, 1000)\n"
              "from wan22.cli import main\ncode = main(sys.argv[1:])\n"
              "sys.exit(9 if 'torch' in sys.modules else code)")  # fmt: skip
    words = ["generate", "--prompt", "x", "--device", "cpu", "--ckpt_dir", str(TINY)]
    result = python(script, *words)
    assert (result.returncode, "it does not fit" in result.stderr) == (3, True), result.stderr


def test_a_full_disk_is_told_before_torch(capsys, tmp_path, monkeypatch):
    """But not where an unfinished run lies, which has its room."""
    monkeypatch.chdir(tmp_path)
    words = ["generate", "--prompt", "x", "--device", "cpu", "--size", "64x64", "--frames", "5", "--steps", "2",
             "--ckpt_dir", str(TINY), "--output", "new/v.mp4"]  # fmt: skip
    usage = type(plan.shutil.disk_usage(tmp_path))
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda folder: usage(1 << 40, 1 << 40, 1000))
    assert cli.main(words) == 3
    err = capsys.readouterr().err
    assert f"error: {tmp_path / 'new'}: the video and its state need" in err
    assert "0.0 MiB are free\nhint: free space" in err
    (tmp_path / "other.state.safetensors").touch()
    assert cli.main([*words[:-1], "v.mp4"]) == 0


def test_reading_early_needs_room_to_quantize_in():
    sizes, request = Sizes.of(open_checkpoint(TINY)), Request("x", width=64, height=64, num_frames=5)
    int8 = Precision("int8").resolve("cpu")
    quantizing = total(reading_terms(request, sizes.at(int8), 2))
    weights = sizes.at(int8).expert_bytes(2)
    text = make_plan(request, int8, Placement("cpu"), sizes, None, HOST).options[0].peak("text")
    assert quantizing > 0
    for spare, early in ((-1, 0), (0, weights + quantizing)):
        host = Room(HOST.total, text + weights + quantizing + plan.HOST_BASE["cpu"] + spare)
        none, expert, block, _ = make_plan(request, int8, Placement("cpu"), sizes, None, host).options
        assert [one.taken("text") - text for one in (none, expert, block)] == [early, early, 0]
        assert [bool(one.beside.get("text")) for one in (none, block)] == [early > 0] * 2  # read ahead, for `block`


# Most of a phase on one H100 80GB, and of the host's memory: GiB, with torch 2.11 (docs/memory.md).
MEASURED = [
    ("480p", "none", None, (10.63, 57.93, 60.03), 1.96), ("480p", "expert", None, (10.63, 30.95, 6.08), 28.89),
    ("480p", "block", None, (10.63, 30.95, 6.08), 55.88), ("480p", "block", 8, (1.99, 6.07, 6.06), 55.89),
    ("720p", "none", None, (10.63, 62.10, 67.34), 2.09), ("720p", "expert", None, (10.63, 35.10, 13.35), 28.98),
    ("720p", "block", None, (10.63, 35.10, 13.35), 56.02), ("720p", "block", 16, (10.63, 14.15, 13.33), 55.89),
]  # fmt: skip


@pytest.mark.parametrize(("size", "offload", "limit", "phases", "on_host"), MEASURED)
def test_what_was_measured(size, offload, limit, phases, on_host):
    chosen = made(78, request=SIZES[size], offload=offload, gpu_memory_limit=limit and limit * GIB).chosen
    assert (chosen.text_encoder, chosen.tiles) == ("stream" if limit == 8 else "device", (1, 1))
    for predicted, found in zip(("text", "denoise", "decode"), phases, strict=True):
        taken = chosen.peak("text") if predicted == "text" else chosen.taken(predicted)
        assert taken / GIB == pytest.approx(found, rel=0.03)
    assert chosen.host_bytes / GIB == pytest.approx(on_host, rel=0.1)


def test_what_stays_as_there_is_room_is_no_need():
    """Both experts beside a decoder, the first one beside the text encoder: no placement is refused for either."""
    for gpu, early, kept in ((80, 1, 1), (68, 1, 0), (64, 1, 0)):
        none = made(gpu, offload="none").chosen
        assert [none.taken(phase) > none.peak(phase) for phase in ("text", "decode")] == [early, kept]
        assert none.taken("decode") + GPU_RESERVE <= gpu * GIB
    assert total(none.beside["text"]) == PUBLISHED.expert_bytes(2)
    expert = made(38, offload="expert").chosen
    assert expert.beside == {}
    text = as_text(made(80), SIZES["720p"], PUBLISHED)
    assert "first expert comes beside the text encoder, 39.0 GiB" in text
    assert "both experts stay while the VAE decodes, 68.7 GiB" in text
    assert "room to spare" not in as_text(made(16), SIZES["720p"], PUBLISHED)


def test_the_embedding_is_gone_before_there_are_scores():
    streamed, whole = (text_terms(mode, PUBLISHED, 2) for mode in ("stream", "device"))
    assert streamed == {"embedding": 2 * 256384 * 4096}
    assert whole["weights"] == 2 * PUBLISHED.text_encoder
    small = replace(PUBLISHED, text_embedding=1000)
    assert total(text_terms("stream", small, 2)) == 2 * (PUBLISHED.text_encoder // 24) + whole["scores"]


def test_text_is_narrow():
    for gpu in (None, 8, 24, 80):
        lines = as_text(made(gpu), SIZES["720p"], PUBLISHED).splitlines()
        assert max(map(len, lines)) <= 80


def test_open_checkpoint_is_what_is_planned_for(tiny):
    assert Sizes.of(open_checkpoint(TINY)) == Sizes.of(tiny)
