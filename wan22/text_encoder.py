"""Prompt → context, through transformers' UMT5 with the published details.

Legend: M text tokens (with the end token, no padding), E the encoder's width.
"""

import gc
import html
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wan22.checkpoint import Checkpoint
from wan22.config import RequestError, RunError
from wan22.files.part_shapes import text_encoder_shapes, text_encoder_sizes
from wan22.files.tensor_files import check_names
from wan22.files.tensor_names import text_encoder_name
from wan22.residency.memory import OUT_OF_MEMORY, empty_on_host, memory_of


def clean(prompt: str) -> str:
    """Mend broken Unicode, undo HTML entities twice, fold white space. Source: the published `tokenizers.py`."""
    import ftfy

    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(prompt)))).strip()


class Tokenizer:
    """The checkpoint's own tokenizer; every prompt ends with the end token."""

    def __init__(self, folder: Path, max_tokens: int) -> None:
        from transformers import AutoTokenizer

        self.max_tokens = max_tokens
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def __call__(self, prompt: str) -> tuple[list[int], bool]:
        """Token ids with the end token, and whether the prompt was cut to `max_tokens` of them."""
        ids = self.tokenizer(clean(prompt), add_special_tokens=True, verbose=False)["input_ids"]
        end = self.tokenizer.eos_token_id
        cut = len(ids) > self.max_tokens
        return ([*ids[: self.max_tokens - 1], end] if cut else ids), cut


class TextEncoder:
    """UMT5's encoder. One prompt at a time and without padding: a context depends on its prompt alone, bit for bit."""

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, streamed: bool = False, ranks: int = 1
    ) -> None:
        """Reads the weights, each cast to `dtype`. streamed: they stay in the host's memory, and each layer's come to
        the device for its turn. ranks: that many processes keep a part each, and all of them must be called alike.
        Raises RequestError for foreign files."""
        from transformers import UMT5EncoderModel

        self.device = device
        with torch.device("meta"):
            # Eager attention is bit-equal to the published one. Built on meta: no initialization to throw away.
            model = UMT5EncoderModel._from_config(_config(checkpoint), attn_implementation="eager")
        names = {published: text_encoder_name(published) for published in checkpoint.text_encoder.shapes}
        if ranks > 1:
            self._shard(checkpoint, model.to(dtype), names, ranks)
            return
        meta = model.state_dict()
        state = {name: empty_on_host(meta[name].shape, dtype) if streamed
                 else torch.empty(meta[name].shape, dtype=dtype, device=device) for name in names.values()}  # fmt: skip
        checkpoint.text_encoder.read({published: state[name] for published, name in names.items()})
        # Its one alias is spelled out, so that a transformers that unties it cannot leave it uninitialized.
        state["encoder.embed_tokens.weight"] = state["shared.weight"]
        model.load_state_dict(state, strict=True, assign=True)
        self.model = model.requires_grad_(False).eval()
        if streamed:
            from accelerate import cpu_offload

            cpu_offload(self.model, device)

    def _shard(self, checkpoint: Checkpoint, model: Any, names: Mapping[str, str], ranks: int) -> None:
        from wan22.several.sharding import shard_text_encoder

        model.encoder.embed_tokens.weight = model.shared.weight
        self.model = model.requires_grad_(False).eval()
        targets, begins = shard_text_encoder(model, model.encoder.block, memory_of(self.device), ranks)
        published = {name: published for published, name in names.items()}
        own = [name for name in targets if name in published]  # a small one may lie on other ranks alone
        checkpoint.text_encoder.read({published[name]: targets[name] for name in own},
                                     {published[name]: begins[name] for name in own})  # fmt: skip

    @torch.inference_mode()
    def __call__(self, ids: list[int]) -> Tensor:
        """Token ids → context [M, E] in the encoder's dtype. The model pads it with zero rows to 512, as published."""
        tokens = torch.tensor([ids], device=self.device)
        return self.model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state[0]


MODES = {"device": "on the device", "stream": "layer by layer", "cpu": "on the CPU"}  # from most to least memory there


def encode_all(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, ids: Mapping[str, list[int]], mode: str,
    say: Callable[[str], None], ranks: int = 1,
) -> dict[str, Tensor]:  # fmt: skip
    """Token ids by prompt → contexts on the CPU, by an encoder that is gone afterwards. mode: one of MODES; where
    memory runs out the next one, which `say` is told. ranks: of several processes that shard it, which have no other.
    Raises RunError where there is none."""
    modes = list(MODES)[list(MODES).index(mode) :][: None if ranks == 1 else 1]
    while True:
        try:
            on = torch.device("cpu") if modes[0] == "cpu" else device
            encoder = TextEncoder(checkpoint, dtype, on, modes[0] == "stream", ranks)
            contexts = {prompt: encoder(tokens).cpu() for prompt, tokens in ids.items()}
            trouble = ""
        except OUT_OF_MEMORY as error:
            trouble = f"out of memory while encoding the text: {str(error).partition('. ')[0]}"
        encoder = None  # type: ignore[assignment]
        if modes[0] == "stream":
            gc.collect()  # accelerate's hooks hold a module in cycles, and with it all weights in the host's memory
        if not trouble:
            return contexts
        if not modes[1:]:
            raise RunError(trouble, hint="see what it needs: wan22 plan")
        modes = modes[1:]
        say(f"{trouble}; going on {MODES[modes[0]]}")


def check_text_encoder(checkpoint: Checkpoint) -> None:
    """Names and shapes of the text encoder's file, without reading a weight. Raises RequestError."""
    found = checkpoint.text_encoder.shapes
    check_names(str(checkpoint.text_encoder.path), found, text_encoder_shapes(**_sizes(checkpoint)))


def _sizes(checkpoint: Checkpoint) -> dict[str, int]:
    """The sizes that no config tells, from the tensors' shapes. Raises RequestError."""
    try:
        return text_encoder_sizes(checkpoint.text_encoder.shapes)
    except (KeyError, ValueError) as error:
        raise RequestError(f"{checkpoint.text_encoder.path}: not a UMT5 encoder: misses {error}") from None


def _config(checkpoint: Checkpoint):  # type: ignore[no-untyped-def]  # transformers comes late
    """The file's sizes; the rest is UMT5's own default."""
    from transformers import UMT5Config

    sizes = _sizes(checkpoint)
    return UMT5Config(
        vocab_size=sizes["vocab"], d_model=sizes["width"], d_kv=sizes["inner"] // sizes["heads"], d_ff=sizes["ffn"],
        num_layers=sizes["layers"], num_heads=sizes["heads"], relative_attention_num_buckets=sizes["buckets"],
        dropout_rate=0.0, tie_word_embeddings=True,  # type: ignore[call-arg]
    )  # fmt: skip
