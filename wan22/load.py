"""From a checkpoint's files to a model ready to run: every choice of a run, in order."""

from dataclasses import replace

import torch

from wan22.checkpoint import Expert
from wan22.model import WanTransformer
from wan22.tensor_files import check_names

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


def empty_expert(expert: Expert, dtype: torch.dtype) -> WanTransformer:
    """The model without memory behind it (on `meta`), its parameters in the dtypes it wants, names and shapes checked
    against the files'. Raises RequestError.

    The text's width is in no published config: it is what the tensor says.
    """
    config = expert.transformer_config()
    if shape := expert.tensors.shapes.get("text_embedding.0.weight"):
        config = replace(config, text_dim=shape[-1])
    with torch.device("meta"):
        model = WanTransformer(config, dtype)
    wanted = {name: tuple(parameter.shape) for name, parameter in model.state_dict().items()}
    check_names(str(expert.tensors.path.parent), expert.tensors.shapes, wanted)
    return model


# Asked for in the middle of a run, whose inference mode would make tensors that the reader's threads cannot fill.
@torch.inference_mode(False)
def load_expert(expert: Expert, dtype: torch.dtype, device: torch.device) -> WanTransformer:
    """Build, then read every tensor once, cast on the way to the dtype that the model declares for it."""
    model = empty_expert(expert, dtype)
    state = {
        name: torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        for name, parameter in model.state_dict().items()
    }
    expert.tensors.read(state)
    model.load_state_dict(state, strict=True, assign=True)
    return model.requires_grad_(False).eval()
