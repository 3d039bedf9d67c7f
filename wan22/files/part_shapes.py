"""The shapes that a text encoder's and a VAE's tensors must have, by published name, from a few sizes. Standard library
only: building the models to ask them would import half a second to three seconds of libraries before anything is read.
"""

from collections.abc import Iterator, Mapping

Shapes = dict[str, tuple[int, ...]]


def text_encoder_shapes(
    vocab: int = 256384, width: int = 4096, ffn: int = 10240, heads: int = 64, layers: int = 24,
    inner: int | None = None, buckets: int = 32,
) -> Shapes:  # fmt: skip
    """A UMT5 encoder's; UMT5-XXL's by default. inner: of all heads together, `width` by default."""
    inner = inner or width
    shapes: Shapes = {"token_embedding.weight": (vocab, width), "norm.weight": (width,)}
    for i in range(layers):
        shapes |= {f"blocks.{i}.attn.{x}.weight": (inner, width) for x in "qkv"}
        shapes |= {f"blocks.{i}.attn.o.weight": (width, inner)}
        shapes |= {f"blocks.{i}.norm{n}.weight": (width,) for n in (1, 2)}
        shapes |= {f"blocks.{i}.ffn.{x}.weight": (ffn, width) for x in ("gate.0", "fc1")}
        shapes |= {f"blocks.{i}.ffn.fc2.weight": (width, ffn)}
        shapes |= {f"blocks.{i}.pos_embedding.embedding.weight": (buckets, heads)}
    return shapes


def text_encoder_sizes(found: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The arguments of `text_encoder_shapes`, read off a file's shapes. Raises KeyError, ValueError."""
    vocab, width = found["token_embedding.weight"]
    buckets, heads = found["blocks.0.pos_embedding.embedding.weight"]
    return {"vocab": vocab, "width": width, "ffn": found["blocks.0.ffn.fc1.weight"][0], "heads": heads,
            "layers": 1 + max(int(name.split(".")[1]) for name in found if name.startswith("blocks.")),
            "inner": found["blocks.0.attn.q.weight"][0], "buckets": buckets}  # fmt: skip


def vae_shapes(width: int = 96, channels: int = 16) -> Shapes:
    """The Wan2.1 VAE's, of this base width and these latent channels."""
    shapes: Shapes = {}

    def add(name: str, *shape: int) -> None:
        shapes.update({f"{name}.weight": shape, f"{name}.bias": shape[:1]})

    def residual(name: str, before: int, after: int) -> None:
        shapes.update({f"{name}.residual.0.gamma": (before, 1, 1, 1), f"{name}.residual.3.gamma": (after, 1, 1, 1)})
        add(f"{name}.residual.2", after, before, 3, 3, 3)
        add(f"{name}.residual.6", after, after, 3, 3, 3)
        if before != after:
            add(f"{name}.shortcut", after, before, 1, 1, 1)

    def ends(side: str, first: tuple[int, int], middle: int, last: tuple[int, int]) -> None:
        add(f"{side}.conv1", *first, 3, 3, 3)
        for number in (0, 2):
            residual(f"{side}.middle.{number}", middle, middle)
        shapes[f"{side}.middle.1.norm.gamma"] = (middle, 1, 1)
        add(f"{side}.middle.1.to_qkv", 3 * middle, middle, 1, 1)
        add(f"{side}.middle.1.proj", middle, middle, 1, 1)
        shapes[f"{side}.head.0.gamma"] = (last[1], 1, 1, 1)
        add(f"{side}.head.2", *last, 3, 3, 3)

    widest = 4 * width
    ends("encoder", (width, 3), widest, (2 * channels, widest))
    before = width
    for number, (kind, after) in enumerate(_down(width)):
        if kind == "residual":
            residual(f"encoder.downsamples.{number}", before, after)
        else:
            add(f"encoder.downsamples.{number}.resample.1", after, after, 3, 3)
            if kind == "time":
                add(f"encoder.downsamples.{number}.time_conv", after, after, 3, 1, 1)
        before = after
    add("conv1", 2 * channels, 2 * channels, 1, 1, 1)
    add("conv2", channels, channels, 1, 1, 1)
    ends("decoder", (widest, channels), widest, (3, width))
    # Four stages of three residual blocks, each but the last doubling the size and halving the channels, two the time.
    for stage, (start, after) in enumerate(((4, 4), (2, 4), (2, 2), (1, 1))):
        for number in range(3):
            residual(f"decoder.upsamples.{4 * stage + number}", (after if number else start) * width, after * width)
        if stage < 3:
            add(f"decoder.upsamples.{4 * stage + 3}.resample.1", after * width // 2, after * width, 3, 3)
        if stage < 2:
            add(f"decoder.upsamples.{4 * stage + 3}.time_conv", 2 * after * width, after * width, 3, 1, 1)
    return shapes


def _down(width: int) -> Iterator[tuple[str, int]]:
    """The encoder's layers: two residual blocks a stage, then half the size, and twice half the time too."""
    for stage, multiple in enumerate((1, 2, 4, 4)):
        yield from [("residual", multiple * width)] * 2
        if stage < 3:
            yield "time" if stage else "space", multiple * width
