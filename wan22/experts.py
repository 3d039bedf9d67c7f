"""The two experts of a run: read when first needed, and who stays on the device meanwhile."""

import torch

from wan22.checkpoint import Checkpoint
from wan22.load import empty_expert, load_expert
from wan22.model import WanTransformer

ROOM_FOR_WORK = 0.25  # of the free memory, left to activations when both experts are kept


class Experts:
    """Hands out experts by name; keeps both on the device, or only the one at work.

    An expert goes from its files straight to the device and, when the other's turn comes, is dropped rather than
    moved to the host: the files are its copy.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, offload: str) -> None:
        """offload: `none` keeps both, `expert` one, `auto` both where they fit. Names and shapes are checked here;
        no weight is read. Raises RequestError."""
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, device
        models = [empty_expert(expert, dtype) for expert in checkpoint.experts.values()]
        self.bytes = sum(tensor.nbytes for model in models for tensor in model.state_dict().values())
        self.keep_both = offload == "none" or (
            offload == "auto" and self.bytes < (1 - ROOM_FOR_WORK) * free_memory(device)
        )
        self._loaded: dict[str, WanTransformer] = {}

    def get(self, name: str) -> WanTransformer:
        """The expert, on its device. The caller lets go of the other one first, or both are held."""
        if name not in self._loaded:
            if not self.keep_both:
                self.release()
            self._loaded[name] = load_expert(self.checkpoint.experts[name], self.dtype, self.device)
        return self._loaded[name]

    def release(self) -> None:
        """Give the device's memory back."""
        self._loaded.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken on a device; for a CPU, of the host's memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available
