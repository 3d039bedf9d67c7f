"""Time on a device: of calls, and of the parts of a model while it runs."""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Clock:
    """Seconds on a device. On a GPU by events on its stream, so that the host's own time is not in them unless the
    device waits for it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> Any:
        """Now, in the device's order of work."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def between(self, start: Any, end: Any) -> float:
        """Seconds from one mark to another; waits for them."""
        if self.device.type != "cuda":
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def __call__(self, run: Callable[[], object], repeats: int = 1, warm_up: bool = True) -> float:
        """Median seconds of a call; one before it, which compiles, is not counted."""
        if warm_up:
            run()
        times = []
        for _ in range(repeats):
            start = self.mark()
            run()
            times.append(self.between(start, self.mark()))
        return statistics.median(times)


OTHER = "norms, elementwise"
PARTS = ("q k v", "attention", "o", "cross", "ffn", OTHER, "embeddings, head")


class PartTimes:
    """Seconds of a forward by its parts. Hooks at the model's seams leave marks; what lies between the parts of the
    blocks is their norms, modulation, rotary embedding and residual sums. `ffn` is with its GELU, `cross` the whole
    cross-attention."""

    def __init__(self, model: nn.Module, clock: Clock) -> None:
        self._model, self._clock = model, clock
        self._marks: list[tuple[str, Any, Any]] = []
        self._began: dict[int, Any] = {}

    def _before(self, module: nn.Module, args: Any) -> None:
        self._began[id(module)] = self._clock.mark()

    def _after(self, part: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            self._marks.append((part, self._began.pop(id(module)), self._clock.mark()))

        return hook

    @contextmanager
    def watched(self) -> Iterator[None]:
        """The forward that runs inside is measured."""
        model: Any = self._model
        modules = [(model.patch_embedding, "embeddings, head"), (model.time_embedding, "embeddings, head"),
                   (model.time_projection, "embeddings, head"), (model.head, "embeddings, head")]  # fmt: skip
        replaced = []
        for block in model.blocks:
            attention = block.self_attn
            products = [attention.qkv] if "qkv" in attention._modules else [attention.q, attention.k, attention.v]
            modules += [*((product, "q k v") for product in products), (attention.o, "o"), (block.cross_attn, "cross"),
                        (block.ffn, "ffn")]  # fmt: skip
            replaced.append((attention, attention.attend))
            attention.attend = self._timed(attention.attend)
        hooks = []
        for module, part in modules:
            hooks += [module.register_forward_pre_hook(self._before), module.register_forward_hook(self._after(part))]
        start = self._clock.mark()
        try:
            yield
            self._marks.append(("all", start, self._clock.mark()))
        finally:
            for hook in hooks:
                hook.remove()
            for attention, attend in replaced:
                attention.attend = attend

    def _timed(self, attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def timed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            start = self._clock.mark()
            out = attend(q, k, v)
            self._marks.append(("attention", start, self._clock.mark()))
            return out

        return timed

    def seconds(self) -> dict[str, float]:
        """By part, in the order of PARTS; their sum is the forward."""
        sums: dict[str, float] = defaultdict(float)
        for part, start, end in self._marks:
            sums[part] += self._clock.between(start, end)
        whole = sums.pop("all")
        sums[OTHER] = whole - sum(sums.values())
        return {part: sums[part] for part in PARTS}
