"""wan22: a prompt in, a video out, with Wan2.2-T2V-A14B.

    from wan22 import Pipeline, Request
    Pipeline.from_pretrained("demo").generate(Request(prompt="a red circle moving left", seed=42)).save("out.mp4")

Names are imported when first used: `import wan22` brings neither torch nor any other library.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wan22.config import Lora, Placement, Precision, Request, WanError
    from wan22.pipeline import Pipeline, Result

__version__ = "0.1.0"
__all__ = ["Lora", "Pipeline", "Placement", "Precision", "Request", "Result", "WanError", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'wan22' has no attribute {name!r}")
    import importlib

    home = "wan22.pipeline" if name in ("Pipeline", "Result") else "wan22.config"
    return getattr(importlib.import_module(home), name)
