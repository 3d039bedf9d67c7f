"""The mesh that is chosen, and what cannot work: arithmetic, no process is started."""

import dataclasses
import socket

import pytest
from conftest import TINY

from wan22 import cli
from wan22.config import DoesNotFit, Placement, Precision, Request, RequestError
from wan22.machine import Room
from wan22.plan import Sizes, make_plan, require_any
from wan22.several import launch
from wan22.several.launch import Team, refuse_lonely, rendezvous, team_of
from wan22.several.mesh import Mesh, Shares, choose_mesh, first_host, shares
from wan22.sizes import cache_terms
from wan22.vae_sizes import cuts, rank_grid, with_halo

TOKENS = 75600  # 720p
GIB = 1 << 30


@pytest.mark.parametrize(("world", "local", "guided", "asked", "mesh"), [
    (2, 2, True, (None, None), (2, 1, 1)),  # guidance first
    (2, 2, False, (None, None), (1, 1, 2)),
    (3, 3, True, (None, None), (1, 1, 3)),  # an odd number has no halves
    (4, 4, True, (None, None), (2, 1, 2)),
    (8, 8, True, (None, None), (2, 1, 4)),
    (8, 8, False, (None, None), (1, 1, 8)),
    (16, 8, True, (None, None), (2, 1, 8)),  # a branch a node
    (32, 8, True, (None, None), (2, 2, 8)),  # the ring between nodes
    (64, 64, False, (None, None), (1, 2, 32)),  # 40 heads do not divide by 64
    (4, 4, True, (4, None), (1, 1, 4)),  # the published command
    (8, 8, True, (4, None), (2, 1, 4)),
    (8, 8, True, (2, None), (2, 2, 2)),
    (8, 8, True, (None, 4), (2, 4, 1)),
    (8, 8, True, (1, 4), (2, 4, 1)),
    (8, 8, False, (2, 4), (1, 4, 2)),
    (7, 7, True, (None, None), (1, 1, 7)),
])  # fmt: skip
def test_choice(world, local, guided, asked, mesh):
    chosen = choose_mesh(world, local, 40, TOKENS, guided, *asked)
    assert chosen == Mesh(*mesh)
    assert chosen.world == world
    assert len({chosen.place(rank) for rank in range(world)}) == world


@pytest.mark.parametrize(("world", "heads", "tokens", "guided", "asked", "said"), [
    (4, 40, TOKENS, True, (3, None), "--ulysses_size 3: does not divide 4 processes"),
    (4, 40, TOKENS, True, (None, 8), "--ring_size 8: does not divide 4 processes"),
    (8, 40, TOKENS, True, (4, 4), "does not divide 8 processes"),
    (8, 40, TOKENS, True, (1, 1), "leaves 8 of 8 processes over"),
    (2, 40, TOKENS, False, (1, 1), "half of 2 processes would idle"),
    (8, 4, TOKENS, False, (8, None), "the model has 4 heads"),
    (64, 40, 60, False, (None, None), "the video has 60 tokens"),
])  # fmt: skip
def test_what_cannot_work_is_one_line(world, heads, tokens, guided, asked, said):
    with pytest.raises(RequestError, match=said) as raised:
        choose_mesh(world, world, heads, tokens, guided, *asked)
    assert "\n" not in str(raised.value)


def test_shares_are_even():
    for total in (1, 3, 40, TOKENS):
        for parts in range(1, 9):
            found = shares(total, parts)
            assert sum(found) == total
            assert max(found) - min(found) <= 1


# --- who this process is -----------------------------------------------------------------------------------------
def test_torchrun_and_slurm_are_understood():
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "a",
                "MASTER_PORT": "1"}  # fmt: skip
    assert team_of(torchrun) == Team(5, 8, 1, 4)
    assert rendezvous(torchrun, Team(5, 8, 1, 4)) == {
        "MASTER_ADDR": "a", "MASTER_PORT": "1", "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}  # fmt: skip
    slurm = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1",
             "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_STEP_NODELIST": "gpu[03-04]", "SLURM_JOB_ID": "77",
             "SLURM_STEP_ID": "0"}  # fmt: skip
    assert team_of(slurm) == Team(5, 8, 1, 4)
    told = rendezvous(slurm, Team(5, 8, 1, 4))
    assert (told["MASTER_ADDR"], told["RANK"], told["WORLD_SIZE"]) == ("gpu03", "5", "8")
    assert 1024 < int(told["MASTER_PORT"]) < 65536
    assert team_of({"SLURM_PROCID": "0", "SLURM_JOB_ID": "77"}) == Team()  # a batch script, not a step
    assert team_of({}) == Team()
    assert [first_host(nodes) for nodes in ("n1", "n[2-4,7]", "a1,b2", "r[08,10]-x")] == ["n1", "n2", "a1", "r08-x"]


@pytest.mark.parametrize("wrong", [
    {"RANK": "x", "WORLD_SIZE": "2"}, {"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "2",
                                                                        "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "2"},
])  # fmt: skip
def test_a_wrong_environment_is_told(wrong):
    with pytest.raises(RequestError, match="the environment says"):
        team_of(wrong)


@pytest.mark.parametrize("port", ["junk", "", "0", "-1", "65536", "1.5", "²"])
def test_a_port_that_is_none_is_told(port):
    with pytest.raises(RequestError, match="MASTER_PORT="):
        rendezvous({"MASTER_ADDR": "a", "MASTER_PORT": port}, Team(0, 2, 0, 2))


@pytest.mark.parametrize(("placement", "world", "said"), [
    (Placement(dit_fsdp=True), 1, "--dit_fsdp needs several processes"),
    (Placement(t5_fsdp=True), 1, "--t5_fsdp needs several processes"),
    (Placement(ulysses_size=4), 1, "--ulysses_size needs several processes"),
    (Placement(gpus=1, ring_size=2), 1, "--ring_size needs several processes"),
    (Placement(gpus=2), 4, "--gpus 2: this is one of 4 processes"),
    (Placement(offload="block"), 2, "--offload block: for one GPU alone"),
    (Placement(offload="disk", gpus=2), 1, "--offload disk: for one GPU alone"),
    (Placement("cuda:1"), 2, "--device cuda:1: there are 2 processes"),
])  # fmt: skip
def test_flags_that_contradict_each_other(placement, world, said):
    with pytest.raises(RequestError, match=said):
        refuse_lonely(placement, Precision(), Team(0, world, 0, world))
    with pytest.raises(RequestError, match="contradict"):
        Placement(text_encoder="cpu", t5_fsdp=True)


def test_what_does_not_go_with_several_is_told_before_they_start(capsys):
    """By generate, its dry run and plan alike."""
    typed = ["--gpus", "2", "--dit_fsdp", "--dtype", "fp8"]
    for command in (["generate", "--ckpt_dir", str(TINY), "--device", "cpu", "--prompt", "x"], ["plan"]):
        for words in (typed, [*typed[:3], "--dtype", "int8"]):
            assert cli.main([*command, *words]) == 2
            told = capsys.readouterr()
            assert told.err.startswith(f"error: --dit_fsdp goes with no {words[-1]} weights\nhint: --dtype bf16")
            assert told.out == ""


@pytest.mark.parametrize(("words", "said"), [
    (["bench", "--layers", "1"], "bench measures one GPU"), (["decode", "x.latents.safetensors"], "for one process"),
    (["batch", "prompts.txt"], "a batch starts its processes itself"),
])  # fmt: skip
def test_commands_that_torchrun_is_not_for(words, said, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        assert cli.main(words) == 2
        told = capsys.readouterr()
        assert told.out == ""
        assert (said in told.err) == (rank == "0")  # told once
        assert told.err.count("error: ") == (rank == "0")


# --- what each needs -------------------------------------------------------------------------------------------------
def plan(gpu, host, shares, **settings):
    request, placement = Request("x"), Placement(**settings)
    return make_plan(request, Precision("bf16"), placement, Sizes.published(), Room(gpu, gpu), Room(host, host),
                     shares=shares)  # fmt: skip


def test_a_rank_needs_less_of_a_gpu():
    alone = plan(200 * GIB, 500 * GIB, Shares())
    four = plan(200 * GIB, 500 * GIB, Shares(4, 4, 1, 1, 4))
    sharded = plan(200 * GIB, 500 * GIB, Shares(4, 4, 4, 1, 4))
    peaks = [made.options[1].peak("denoise") / GIB for made in (alone, four, sharded)]
    print(peaks)
    weights = Sizes.published().expert_bytes(2) / GIB
    assert peaks[0] > peaks[1] > peaks[2]
    assert peaks[2] < peaks[1] - 0.6 * weights  # three quarters of an expert, but for the blocks at work
    assert [option.residency.kind for option in four.options] == ["none", "expert"]
    assert len(four.ladder) == 1


def test_no_rank_pins_a_copy_of_its_own():
    """Eight copies of an expert are 230 GB of a host's memory."""
    made = plan(80 * GIB, 2000 * GIB, Shares(8, 4, 1, 1, 8))
    assert [option.residency.host_experts for option in made.options] == [0, 0]
    assert made.options[0].host["base"] == 8 * plan(80 * GIB, 2000 * GIB, Shares()).options[0].host["base"]


def test_experts_are_sharded_where_they_do_not_fit_whole():
    request, sizes, host = Request("x"), Sizes.published(), Room(900 * GIB, 900 * GIB)
    for gpu, wanted in ((80, False), (24, True)):
        room, eight = Room(gpu * GIB, gpu * GIB), Shares(8, 4, 1, 1, 8)
        assert require_any(request, Precision("bf16"), Placement(), sizes, room, host, eight)[1] is wanted
    asked = dataclasses.replace(eight, shards=8)
    assert require_any(request, Precision("bf16"), Placement(), sizes, Room(80 * GIB, 80 * GIB), host, asked)[1] is True


def test_a_step_cache_is_shared_out():
    """Tokens along the sequence, branches along the guidance axis."""
    request, precision, sizes = Request("x"), Precision("bf16", step_cache=0.1), Sizes.published()
    numbers = 75600 * 5120
    assert cache_terms(request, sizes, precision) == {"step cache": numbers * (2 * 2 * 2 + 4)}
    assert cache_terms(request, sizes, precision, 4) == {"step cache": numbers // 4 * (2 * 2 * 2 + 4)}
    assert cache_terms(request, sizes, precision, 1, 2) == {"step cache": numbers * (2 * 2 + 4)}
    room = Room(200 * GIB, 200 * GIB)
    plans = [make_plan(request, one, Placement(), sizes, room, room, shares=Shares(4, 2, 1, 1, 4))
             for one in (precision, Precision("bf16"))]  # fmt: skip
    peaks = [plan.options[1].peak("denoise") for plan in plans]
    assert peaks[0] - peaks[1] == numbers // 2 * (2 * 2 + 4)


def test_8_bits_are_not_sharded_where_they_do_not_fit():
    gpu, host = Room(12 * GIB, 12 * GIB), Room(900 * GIB, 900 * GIB)
    with pytest.raises(DoesNotFit):
        require_any(Request("x"), Precision("fp8"), Placement(), Sizes.published(), gpu, host, Shares(8, 4, 1, 1, 8))


def test_where_processes_meet(monkeypatch):
    """A port of which no socket that asks for any is given, and which is free on all addresses."""
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        drawn = iter([port - 10_000, 17])
        monkeypatch.setattr(launch.secrets, "randbelow", lambda below: next(drawn))
        assert launch._free_port() == 10_017
        monkeypatch.setattr(launch.secrets, "randbelow", lambda below: port - 10_000)
        assert launch._free_port() not in (port, 0)
    monkeypatch.undo()
    ports = {launch._free_port() for _ in range(50)}
    assert len(ports) > 40
    assert max(ports) < 16_000


def test_a_tile_a_rank():
    shape = (16, 21, 90, 160)
    for ranks in range(1, 17):
        rows, columns = rank_grid(shape, ranks)
        assert rows * columns == ranks
    sides = [with_halo(*cut, 160) for cut in cuts(160, 2)]
    print(f"two ranks at 720p decode {max(stop - start for start, stop in sides) / 160:.0%} each")
    assert rank_grid((16, 1, 1, 3), 4) == (1, 3)  # fewer latents than ranks


def test_predictions_follow_their_formula():
    from bench_parallel import predicted_step

    sizes = {"tokens": TOKENS, "dim": 5120, "layers": 40}
    assert predicted_step(10, 1e30, Mesh(), **sizes) == 20
    assert predicted_step(10, 1e30, Mesh(2, 1, 4), **sizes) == pytest.approx(2.5)
    assert predicted_step(10, 1e9, Mesh(2, 1, 1), **sizes) == 10  # one velocity a step is not counted
    # Two ranks: each sends half of 4 · 37,800 · 5,120 numbers of two bytes a block.
    slow = predicted_step(10, 1e11, Mesh(1, 1, 2), **sizes) - 10
    assert slow == pytest.approx(2 * 40 * 4 * 37_800 * 5120 / 2 * 2 / 1e11)
