"""What a card can do, by its compute capability: the one place that refuses an approximation, or picks its form.

| cards                  | capability | products  | our 8-bit attention, the presets' first  |
|------------------------|------------|-----------|------------------------------------------|
| Ada, Hopper, and later | ≥ 8.9      | fp8, int8 | `int8`, `int8-bf16`                      |
| Ampere                 | 8.0 to 8.8 | int8      | `int8-bf16`, `int8`                      |
| older                  | < 8.0      | none      | none                                     |

`int8` attention has INT8 scores, probabilities and values, `int8-bf16` INT8 scores, bf16 probabilities and values.

On a CPU the plain forms compute every approximation, exactly as it rounds and slowly: asked for by their own flags, not
by a preset. Standard library only.
"""

from typing import Any

from wan22.config import EIGHT_BIT, Precision, RequestError
from wan22.machine import gpu_capability

Capability = tuple[int, int]
AMPERE, ADA = (8, 0), (8, 9)
PRESETS = ("exact", "high", "fast")
FAST_STEP_CACHE = 0.2


def capability_of(device: str) -> Capability | None:
    """Of the card that a `--device` means; None on a CPU. Raises nothing."""
    return None if device == "cpu" else gpu_capability("cuda" if device == "auto" else device)


def preset(name: str, capability: Capability | None) -> dict[str, Any]:
    """The settings of a Precision that a preset stands for on this card. Raises RequestError where it has none.

    exact: nothing approximated. high: 8-bit feed-forward and attention; the VAE in bf16. fast: all products in 8 bits
    and the step cache beside. Their measured drift: docs/speed.md.
    """
    if name not in PRESETS:
        raise RequestError(f"--precision {name}: unknown", hint=f"known: {', '.join(PRESETS)}")
    if name == "exact":
        return {"weights": "auto", "attention": "auto", "scope": None, "step_cache": 0.0, "vae": "float32"}
    if capability is None:
        raise RequestError(
            f"--precision {name}: needs a GPU with 8-bit products (Ampere or later); there is none here",
            hint="a CPU only emulates them: --dtype int8, --attention int8, --step-cache 0.2",
        )
    if capability < AMPERE:
        raise RequestError(f"--precision {name}: {_has(capability)}; 8-bit products need 8.0 (Ampere) or later",
                           hint="--precision exact, and --step-cache 0.2")  # fmt: skip
    newer = capability >= ADA
    return {
        "weights": "fp8" if newer else "int8",
        "attention": "int8" if newer else "int8-bf16",
        "scope": "all" if name == "fast" else "ffn",
        "step_cache": FAST_STEP_CACHE if name == "fast" else 0.0,
        "vae": "bf16",
    }


def resolve(precision: Precision, device: str, capability: Capability | None) -> Precision:
    """`auto` made definite for a device type; never an approximation that was not asked for. Raises RequestError for
    what the card cannot do."""
    precision = precision.resolve(device)
    if device == "cpu" or capability is None:
        return precision
    if precision.weights in EIGHT_BIT:
        least = ADA if precision.weights == "fp8" else AMPERE
        if capability < least:
            name = "8.9 (Ada, Hopper)" if least == ADA else "8.0 (Ampere)"
            hint = "--dtype int8" if capability >= AMPERE else "--dtype bf16"
            raise RequestError(f"--dtype {precision.weights}: {_has(capability)}; it needs {name} or later", hint=hint)
    if precision.attention.startswith("int8") and capability < AMPERE:
        raise RequestError(f"--attention {precision.attention}: {_has(capability)}; it needs 8.0 (Ampere) or later",
                           hint="--attention auto")  # fmt: skip
    return precision


def _has(capability: Capability) -> str:
    return f"this card has compute capability {capability[0]}.{capability[1]}"
