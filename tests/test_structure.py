"""The house's order: imports point down, the settings need no library, the command line answers at once."""

import ast
import subprocess
import sys
import time

import pytest
from conftest import ROOT

FLOORS = [
    {"cli"},
    {"cli_many", "cli_bench"},
    {"batch", "bench", "compare"},
    {"local", "ray_cluster"},
    {"group"},
    {"worker"},
    {"items", "parts", "memory_rows"},
    {"options"},
    {"pipeline", "convert", "download", "prompt_extend", "gallery"},
    {"preview", "vae_parallel"},
    {"plan", "text_encoder", "sampling", "vae", "video", "contents", "random_weights", "rivals",
     "prompt_cache"},
    {"sizes"},
    {"experts", "state", "step_cache", "sheet"},
    {"streaming", "record", "vae_decoder", "sharding"},
    {"load"},
    {"chunks"},
    {"checkpoint", "lora", "pack", "quantize", "parallel"},
    {"expert_files"},
    {"layouts"},
    {"scaled_fp8"},
    {"gguf_files", "tensor_names"},
    {"tensor_files"},
    {"reading"},
    {"model"},
    {"attention"},
    {"kernels"},
    {"hub"},
    {"target"},
    {"journal", "streams"},
    {"names", "report", "verify", "claim"},
    {"memory", "capability"},
    {"machine", "vae_sizes", "work", "rates", "clock", "part_shapes", "launch"},
    {"mesh", "watch", "signals"},
    {"config"},
]
FLOOR = {name: number for number, floor in enumerate(FLOORS) for name in floor}
FORBIDDEN = {
    "model": ("torch.distributed", "diffusers", "transformers"),
    "config": ("torch", "numpy", "typer", "diffusers", "transformers"),
    "video": ("torch",),
}


def modules():
    """Every file by its name, kernels as one; folders only hold what belongs together."""
    for path in sorted((ROOT / "wan22").rglob("*.py")):
        parts = path.relative_to(ROOT / "wan22").with_suffix("").parts
        if parts[-1] not in ("__init__", "__main__") or parts[0] == "kernels":
            yield "kernels" if parts[0] == "kernels" else parts[-1], path


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports by a relative name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize(("name", "path"), list(modules()), ids=lambda value: str(value))
def test_imports_point_down(name, path):
    assert name in FLOOR, f"{path} stands on none of FLOORS"
    for other in imported(path):
        ours = other.split(".")[1:3] if other.startswith("wan22.") else []
        part = next((part for part in ours if part in FLOOR), None)
        assert part is None or FLOOR[part] > FLOOR[name] or part == name, f"{path} imports {other}"
        assert not other.startswith(FORBIDDEN.get(name, ("\0",))), f"{path} imports {other}"


def run(*words):
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=ROOT, check=False)


def test_help_is_quick_and_brings_no_library():
    script = "import sys; sys.argv = ['wan22', '--help']; from wan22.cli import main; main(['--help']); " \
             "sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'transformers', 'diffusers')))"  # fmt: skip
    assert run("-c", script).returncode == 0
    script = "import sys, time; from wan22.cli import main; main(['--help']); " \
             "print(time.process_time(), file=sys.stderr)"  # fmt: skip
    times = []
    for _ in range(3):
        result = run("-c", script)
        times.append(float(result.stderr))
        assert "generate" in result.stdout
    print(f"wan22 --help: {min(times):.2f} s")
    assert min(times) < 0.5  # of a processor: other work on the machine does not count


def test_missing_weights_are_told_at_once(tmp_path):
    start = time.perf_counter()
    result = run(
        "generate.py", "--task", "t2v-A14B", "--size", "1280*720", "--ckpt_dir", str(tmp_path / "T2V_A14B_weights"),
        "--offload_model", "True", "--convert_model_dtype", "--prompt", "A beautiful sunset over the ocean",
    )  # fmt: skip
    seconds = time.perf_counter() - start
    print(f"{seconds:.2f} s")
    assert result.returncode == 2
    assert "T2V_A14B_weights" in result.stderr
    assert "wan22 download" in result.stderr
    assert seconds < 1


def test_a_wrong_file_is_told_before_torch(tiny_copy):
    shard = next((tiny_copy / "low_noise_model").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    script = "import sys; from wan22 import cli; c=cli.main(sys.argv[1:]);sys.exit(9 * ('torch' in sys.modules) or c)"
    result = run("-c", script, "generate", "--prompt", "x", "--ckpt_dir", str(tiny_copy))
    assert (result.returncode, "truncated" in result.stderr) == (2, True)
