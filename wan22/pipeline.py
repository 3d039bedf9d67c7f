"""A prompt becomes a video: the whole way in one screen."""

import math
import platform
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

import wan22
from wan22.attention import BACKENDS, Shape, choose
from wan22.capability import resolve
from wan22.checkpoint import Checkpoint, Parts, find_checkpoint, hub_cache, open_checkpoint
from wan22.config import (
    DEFAULT_TASK,
    MODEL_SPECS,
    Encoding,
    Placement,
    Precision,
    Request,
    RequestError,
    RunError,
    WanError,
    data_dir,
    digest,
    load_preset,
)
from wan22.experts import Experts
from wan22.load import DTYPES, eight_bit_of
from wan22.lora import Adapters
from wan22.machine import host_memory
from wan22.output.names import default_output
from wan22.parallel import Ranks
from wan22.plan import Plan, Sizes, pick_tiles, require, require_any
from wan22.preview import Preview
from wan22.prompt_cache import Encoded, cache_for
from wan22.report import Reporter
from wan22.residency.memory import limit_gpu_memory
from wan22.sampling import denoise, describe_split, draw_noise, evaluate, first_loras, plan_steps
from wan22.several.launch import refuse_sharded
from wan22.several.vae_parallel import decode_together
from wan22.several.watch import ticking
from wan22.sizes import text_terms, total
from wan22.state import Follower, RunState, begin_automatic, begin_given, read_state
from wan22.step_cache import StepCache
from wan22.text_encoder import Tokenizer, check_text_encoder, encode_all
from wan22.vae import VideoVAE, check_vae, to_uint8
from wan22.vae_sizes import Grid, decode_terms, rank_grid
from wan22.video import IfExists, check_writable, open_output


@dataclass
class Result:
    """A finished video in memory: frames [F, H, W, 3] uint8, latents [C, T, H/8, W/8] float32, and how it was made."""

    video: np.ndarray
    latents: Tensor
    request: Request
    record: dict[str, Any]

    def save(self, path: str | Path, overwrite: bool = False) -> Path:
        """Write .mp4, .gif, .png (a frame sheet) or a folder of frames, the record inside. Raises RequestError."""
        policy: IfExists = "replace" if overwrite else "error"
        check_writable(path, if_exists=policy)
        return _write(path, self.request, self.record, [self.video], policy)


class Pipeline:
    """An opened checkpoint and the settings to run it with; nothing is read before it is needed."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        precision: Precision = Precision(),  # noqa: B008 (frozen)
        placement: Placement = Placement(),  # noqa: B008
        encoding: Encoding = Encoding(),  # noqa: B008
        ranks: Ranks | None = None,
    ) -> None:
        """Checks every file's names and shapes; reads no weight. ranks: the processes that make each video together,
        every one of which calls the same of what follows. Raises RequestError."""
        self.checkpoint, self.placement, self.encoding, self.ranks = checkpoint, placement, encoding, ranks
        self.device = ranks.device if ranks else _device(placement.device)
        self.precision = resolve_precision(precision, self.device)
        if ranks and ranks.shard_experts:
            refuse_sharded(self.precision)
        self.dtype = DTYPES[self.precision.weights]
        check_text_encoder(checkpoint)
        check_vae(checkpoint)
        self.adapters = find_adapters(checkpoint, placement)
        self.experts = Experts(
            checkpoint, self.dtype, self.device, self.adapters, eight_bit=eight_bit_of(self.precision)
        )
        self.experts.ranks = ranks
        self._attention_chosen = False
        self.sizes = Sizes.of(checkpoint)
        self.identity = checkpoint.identity()
        limit_gpu_memory(self.device, placement.gpu_memory_limit)
        self._contexts: dict[str, Tensor] = {}  # of prompts encoded before, on the CPU
        self._cut: set[str] = set()  # those that were too long
        self.ahead: Sequence[str] = ()  # prompts that come next: encoded with one that has to be, and kept till then

    @classmethod
    def from_pretrained(
        cls,
        model: str | None = None,
        *,
        device: str = "auto",
        dtype: str = "auto",
        precision: Precision | None = None,
        placement: Placement | None = None,
        parts: Parts = Parts(),  # noqa: B008 (frozen)
    ) -> Self:
        """model: a folder, `demo`, `owner/name` in the Hugging Face cache; nothing: the usual places. parts: files or
        folders, in any layout, for parts of it.

        `device` and `dtype` are short for `Placement(device=…)` and `Precision(weights=…)`, and go with none of these.
        Raises RequestError.
        """
        if (precision and dtype != "auto") or (placement and device != "auto"):
            raise RequestError("dtype goes with no precision, and device with no placement", hint="say it in that one")
        where = find_checkpoint(model) if model or not parts.need_no_base else None
        checkpoint = open_checkpoint(where, parts=parts)
        return cls(checkpoint, precision or Precision(dtype), placement or Placement(device))

    @property
    def _speaks(self) -> bool:
        """Whether this is the process, of one or several, that writes."""
        return self.ranks is None or self.ranks.first

    @property
    def is_demo(self) -> bool:
        return self.checkpoint.folder.resolve() == data_dir("demo").resolve()

    def request(self, prompt: str, **settings: Any) -> Request:
        """A request whose defaults are this model's own: the published recipe, or the demo's small videos."""
        defaults = load_preset("demo").request if self.is_demo else {}
        request = Request.from_dict({"prompt": prompt, **defaults, **settings})
        return request.with_boundary(self.checkpoint.boundary)

    def generate(self, request: Request, reporter: Reporter | None = None) -> Result:
        """Make the video in memory. Raises RequestError, RunError."""
        reporter = reporter or Reporter()
        request = self.resolve(request)
        latents = self.denoise(request, reporter)
        with reporter.phase("decode"):
            video = np.concatenate(list(self.decode(latents, reporter)))
        return Result(video, latents, request, self.record(request))

    def begin(
        self, request: Request, output: Path | None = None, overwrite: bool = False, folder: Path = Path()
    ) -> tuple[Request, RunState]:
        """Claim a run's output and look for what is done of it already: the resolved request, and the state to run in.

        Without `output` the name is made of the prompt and a digest of all that decides the picture, in `folder`; and
        without a seed the unfinished run's is taken up again, where there is one. Raises Busy, RequestError.
        """
        drawn = request.seed is None
        request = self.resolve(request)
        if self.ranks and not self.ranks.first:
            begun = self.ranks.share(None)
            if isinstance(begun, Exception):
                raise begun
            request, lead = begun
            return request, Follower(lead)
        record = self.record(request)
        save_every = self.placement.save_every
        settings: dict[str, Any] = {"any_seed": drawn, "steps": request.num_steps, "save_every": save_every}
        try:
            if output:
                state = begin_given(output, record, overwrite=overwrite, **settings)
            else:
                state = begin_automatic(self.name(request, folder), record, **settings)
        except (WanError, OSError) as error:
            if self.ranks:
                self.ranks.share(error)
            raise
        request = replace(request, seed=state.record["request"]["seed"])
        if self.ranks:
            self.ranks.share((request, state.lead))
        return request, state

    def name(self, request: Request, folder: Path) -> Path:
        """What the video of a resolved request is called where nobody says otherwise."""
        return video_name(folder, request, self.precision, self.identity)

    def generate_file(
        self, request: Request, state: RunState, if_exists: IfExists, keep_latents: bool, reporter: Reporter,
        preview: bool = False,
    ) -> Path:  # fmt: skip
        """Make the video in a file, encoded while it is decoded, from wherever its state says; with a preview beside it
        until it is whole. The caller leaves the state by whatever is raised: RequestError, RunError."""
        if not state.finished:
            record = self.record(request)
            early = Preview(self.checkpoint, request, state.output, reporter.warn) if preview and self._speaks else None
            try:
                latents = self.denoise(request, reporter, state, early)
            finally:
                if early:
                    early.close()
            state.finish(latents)
            if state.trouble:
                reporter.warn(f"the latents could not be kept: {state.trouble}")
            with reporter.phase("decode and write"):
                if not self._speaks:
                    assert not list(self.decode(latents, reporter))
                else:
                    state.output = _write(state.output, request, record, self.decode(latents, reporter), if_exists)
        state.close(keep_latents)
        return state.output

    def resolve(self, request: Request) -> Request:
        """The request with everything definite: a seed drawn where none was given, adapters found and checked by
        their headers. Raises RequestError."""
        if request.noise_device == "cuda" and not torch.cuda.is_available():
            raise RequestError("--noise-device cuda: there is no GPU here")
        self.choose_attention(request)
        request = request.with_boundary(self.checkpoint.boundary)
        seed = secrets.randbelow(2**32) if request.seed is None else request.seed
        return replace(request, seed=seed, loras=self.adapters.resolve(request.loras))

    def choose_attention(self, request: Request) -> None:
        """Once, at the first request's shape: the backend that is asked for, if it is right on this device, or for
        `auto` the fastest that is. `precision` says which from then on. Raises RequestError."""
        if self._attention_chosen:
            return
        config = next(iter(self.checkpoint.experts.values())).transformer_config()
        length = math.prod(n // step for n, step in zip(request.latent_shape[1:], config.patch_size, strict=True))
        shape = Shape(length, config.num_heads, config.head_dim)
        self.experts.attention = choose(self.precision.attention, shape, self.device, self.dtype)
        if self.ranks:  # measured here too, which compiles it; but every rank's must round alike
            self.experts.attention = self.ranks.share(self.experts.attention)
        self.precision = replace(self.precision, attention=self.experts.attention)
        self._attention_chosen = True

    def warnings(self, request: Request) -> list[str]:
        """What is allowed and known to disappoint, of a resolved request."""
        return [*self.checkpoint.warnings, *request.warnings(), *self.adapters.warnings(request.loras)]

    def record(self, request: Request) -> dict[str, Any]:
        """How a video was made, whole enough to make it again; nothing in it depends on time or place."""
        libraries = ("torch", "diffusers", "transformers")
        return {
            "request": request.to_dict(),
            "precision": self.precision.to_dict(),
            "model": "demo" if self.is_demo else self.checkpoint.name,
            "checkpoint": self.identity,
            "encoding": self.encoding.to_dict(),
            "versions": {"wan22": wan22.__version__, "python": platform.python_version()}
            | {name: version(name) for name in libraries},
        }

    def plan(self, request: Request) -> Plan:
        """What the request needs of this machine, or of each rank's, and how it is met. Raises DoesNotFit."""
        gpu, host = self.experts.memory.rooms()
        if not self.ranks:
            return require(request, self.precision, self.placement, self.sizes, gpu, host)
        rooms = self.ranks.gather((gpu, host))  # and all must find the same
        host = min((host for _, host in rooms), key=lambda room: room.free)
        gpu = gpu and min((gpu for gpu, _ in rooms), key=lambda room: room.free)
        plan, self.ranks.shard_experts = require_any(
            request, self.precision, self.placement, self.sizes, gpu, host, self.ranks.shares()
        )
        return plan

    def denoise(
        self, request: Request, reporter: Reporter, state: RunState | None = None, preview: Preview | None = None
    ) -> Tensor:
        """Prompt and noise, or a state that lies on the disk → latents [C, T, H/8, W/8] float32 on the CPU. Raises
        DoesNotFit, RunError."""
        self.choose_attention(request)
        begun = state.begun if state else None
        if begun and begun.done == request.num_steps:
            return begun.latents
        plan = self.plan(request)
        assert plan.chosen
        self.experts.use(plan.ladder)
        if self.ranks:
            reporter.note(self.ranks.describe())
        steps = plan_steps(request)
        guided = any(step.guidance != 1 for step in steps)
        prompts = [request.prompt, request.negative_prompt] if guided else [request.prompt]
        self._make_room_for_text(prompts, plan.chosen.text_encoder)
        cold = self.experts.first_ready is None
        if not begun and "text" in plan.chosen.beside:
            # Nearly always the first one's turn; reading takes longer than all that is imported and encoded meanwhile.
            self.experts.begin(request.spec.experts[0], first_loras(request))
        with reporter.phase("encode the text"):
            contexts = [context.to(self.device) for context in self.encode(prompts, reporter, plan.chosen.text_encoder)]
        reporter.note(describe_split(steps, request.spec.experts))
        with reporter.phase("denoise"):
            noise = draw_noise(request, self.device)
            reporter.begin_steps(len(steps), begun.done if begun else 0)
            threshold = self.precision.step_cache
            cache = StepCache(threshold, self.ranks.agree) if self.ranks else StepCache(threshold)
            try:
                negative = contexts[1] if guided else None
                with ticking():
                    latents = denoise(
                        request, self.experts, noise, contexts[0], negative,
                        on_step=lambda step: reporter.step(step.index, step.expert, step.timestep),
                        begun=begun, keep=state.keep if state else lambda progress: None, warn=reporter.warn,
                        cache=cache, look=preview.look if preview else lambda clean: None,
                        evaluate=self.ranks.evaluate if self.ranks else evaluate,
                    )  # fmt: skip
            finally:
                reporter.end_steps()
        if cache.threshold:
            reporter.note(f"the step cache spared {cache.skipped} of {len(steps)} steps", skipped=cache.skipped)
        reporter.stall = self.experts.stall
        if cold and self.experts.first_ready:
            reporter.to_first_step = self.experts.first_ready - _process_start()
        if not self.experts.keep_both:
            self.experts.release(host=False)
        if not latents.isfinite().all():
            if state:
                state.discard()
            raise RunError("the latents are not finite numbers", hint="check the files: wan22 download --check FOLDER")
        return latents.cpu()

    def encode(self, prompts: list[str], reporter: Reporter, mode: str = "device") -> list[Tensor]:
        """Prompts → contexts, each [M, text_dim], on the CPU. The encoder leaves the device again.

        mode: the encoder on the `device`, in a `stream` to it, or on the `cpu`; where memory runs out, the next one.
        Raises RunError.
        """
        if not self.ranks or self.ranks.shard_text:
            return self._encode(prompts, reporter, mode)
        return self.ranks.share(self._encode(prompts, reporter, mode) if self.ranks.first else None)

    def _make_room_for_text(self, prompts: list[str], mode: str) -> None:
        """Experts of the video before stay beside the text encoder where both have room. Otherwise they go, on all
        ranks or none, and are read again: those on the device, or in the host's memory too."""
        ranks, sizes, item = self.ranks, self.sizes, self.dtype.itemsize
        short = on_host = False
        if any(prompt not in self._contexts for prompt in prompts) and (not ranks or ranks.first or ranks.shard_text):
            on_cpu, shards = self.device.type == "cpu", ranks.mesh.world if ranks and ranks.shard_text else 1
            needs = total(text_terms("device" if on_cpu else mode, sizes, item, shards))
            short = needs > self.experts.memory.free(self.placement.gpu_memory_limit)
            on_host = not on_cpu and mode != "device" and sizes.text_encoder * item > 0.9 * host_memory().free
        if ranks:
            found = ranks.gather((short, on_host))
            short, on_host = (any(one) for one in zip(*found, strict=True))
        if short or on_host:
            self.experts.release(host=on_host)

    def _encode(self, prompts: list[str], reporter: Reporter, mode: str) -> list[Tensor]:
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._contexts]
        if missing and self.ahead:
            wanted = dict.fromkeys([*prompts, *self.ahead])
            self._contexts = {prompt: self._contexts[prompt] for prompt in wanted if prompt in self._contexts}
            missing = [prompt for prompt in wanted if prompt not in self._contexts]
        on = torch.device("cpu") if mode == "cpu" else self.device
        cache = cache_for(self.checkpoint, self.dtype, on) if self.placement.prompt_cache and missing else None
        encoded = {prompt: found for prompt in missing if cache and (found := cache.get(prompt))}
        if self.ranks and self.ranks.shard_text:  # all must miss the same
            encoded = self.ranks.share(encoded)
        self._cut |= {prompt for prompt, found in encoded.items() if found.cut}
        self._contexts |= {prompt: found.context for prompt, found in encoded.items()}
        if missing := [prompt for prompt in missing if prompt not in encoded]:
            tokenizer = Tokenizer(self.checkpoint.tokenizer, MODEL_SPECS[DEFAULT_TASK].text_len)
            tokens = {prompt: tokenizer(prompt) for prompt in missing}
            self._cut |= {prompt for prompt, (_, too_long) in tokens.items() if too_long}
            troubles = []

            def say(trouble: str) -> None:
                self.experts.release()
                reporter.warn(trouble)
                troubles.append(trouble)

            ids = {prompt: found for prompt, (found, _) in tokens.items()}
            world = self.ranks.mesh.world if self.ranks and self.ranks.shard_text else 1
            contexts = encode_all(self.checkpoint, self.dtype, self.device, ids, mode, say, world)
            self.experts.memory.trim()
            self._contexts |= contexts
            if cache and not troubles and self._speaks:  # after which it was perhaps another device's work
                for prompt, context in contexts.items():
                    cache.put(prompt, Encoded(context, prompt in self._cut))
        for prompt in (prompt for prompt in dict.fromkeys(prompts) if prompt in self._cut):
            most = MODEL_SPECS[DEFAULT_TASK].text_len
            reporter.warn(f"the prompt is longer than {most} tokens; the rest is cut: {prompt[:40]}…")
        return [self._contexts[prompt] for prompt in prompts]

    def decode(self, latents: Tensor, reporter: Reporter | None = None) -> Iterator[np.ndarray]:
        """Latents → chunks of frames [F, H, W, 3] uint8, as they come. Raises RunError."""
        reporter = reporter or Reporter()
        dtype = DTYPES[self.precision.vae]
        tiles = self._tiles(latents, dtype)
        if self.ranks:  # the frames on the first one, none on the others
            with ticking():
                vae = VideoVAE(self.checkpoint, self.device, dtype)
                yield from decode_together(vae, latents.to(self.device), tiles, self.ranks)
            return
        vae = VideoVAE(self.checkpoint, self.device, dtype)
        for chunk in vae.decode(latents.to(self.device), tiles, reporter.warn, self.experts.give_up):
            yield to_uint8(chunk)

    def _tiles(self, latents: Tensor, dtype: torch.dtype) -> Grid:
        """The coarsest grid that fits, one tile a rank or more and the same on all ranks. Experts stay, for the next
        video, where the coarsest of all fits beside them; otherwise they are released first."""
        ranks = self.ranks
        world = ranks.mesh.world if ranks else 1

        def room() -> int:
            free = self.experts.memory.free(self.placement.gpu_memory_limit)
            return min(ranks.gather(free // ranks.on_this_device)) if ranks else free

        free = room()
        whole = decode_terms(latents.shape, self.sizes.vae_width, rank_grid(latents.shape, world), dtype.itemsize)
        if total(whole) > free:
            self.experts.release()
            free = room()
        return pick_tiles(latents.shape, self.sizes, free, dtype.itemsize, world)

    def decode_file(self, file: Path, output: Path | None, overwrite: bool, reporter: Reporter) -> Path:
        """Make the video of latents that were kept, with the record in them. Raises RequestError, RunError."""
        saved = read_state(file)
        if saved.done < saved.steps:
            raise RequestError(f"{file}: {saved.done} of {saved.steps} steps are done",
                               hint="the command that was broken off goes on from there")  # fmt: skip
        if saved.record.get("checkpoint") != self.identity:
            raise RequestError(f"{file}: was made with another checkpoint than {self.checkpoint.folder}",
                               hint="name the one it was made with: --ckpt_dir FOLDER")  # fmt: skip
        Encoding.from_dict(saved.record.get("encoding", {}), str(file))
        request, latents = Request.from_dict(saved.record["request"], str(file)), saved.progress().latents
        stem = re.sub(r"\.(latents|state)\.safetensors$", "", file.name)
        with reporter.phase("decode and write"):
            policy: IfExists = "replace" if overwrite else "error" if output else "number"
            chunks = self.decode(latents, reporter)
            return _write(output or file.with_name(f"{stem}.mp4"), request, saved.record, chunks, policy)


def _process_start() -> float:
    """When this process was started, as time.time() has it: when Enter was pressed, for a command."""
    import psutil

    return psutil.Process().create_time()


def video_name(folder: Path, request: Request, precision: Precision, identity: str) -> Path:
    """A name made of the prompt and a digest of all that decides the picture; request and precision are resolved.

    Which of the exact attention backends is at work decides no more than roundings, and is not known before a GPU has
    tried them: it is no part of the name."""
    if precision.attention in BACKENDS and BACKENDS[precision.attention].exact:
        precision = replace(precision, attention="auto")
    decides = digest(request.to_dict(), precision.to_dict(), {"": identity})
    return default_output(folder, request.original_prompt or request.prompt, decides)


def resolve_precision(precision: Precision, device: torch.device) -> Precision:
    """A precision as this device runs it. Raises RequestError for what it cannot do."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return resolve(precision, device.type, capability)


def find_adapters(checkpoint: Checkpoint, placement: Placement) -> Adapters:
    """Where adapters are looked for: the folder asked for, then here, and in and beside the checkpoint's folder."""
    shapes = next(iter(checkpoint.experts.values())).tensors.shapes
    near = (Path(), checkpoint.folder, checkpoint.folder.parent)
    places = dict.fromkeys(folder / name for folder in near for name in ("", "loras"))
    return Adapters(shapes, [*map(Path, filter(None, [placement.lora_dir])), *places], hub_cache())


def _device(name: str) -> torch.device:
    """A placement's device; a GPU with its number, without which some of torch's functions refuse it. Raises
    RequestError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        if (device.index or 0) >= torch.cuda.device_count():
            raise RequestError(f"--device {name}: there are {torch.cuda.device_count()} GPUs here")
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    return device


def _write(
    path: str | Path, request: Request, record: dict[str, Any], chunks: Any, if_exists: IfExists
) -> Path:
    output = open_output(
        path, width=request.width, height=request.height, fps=request.fps, record=record, if_exists=if_exists,
        encoding=Encoding.from_dict(record.get("encoding", {})),
    )  # fmt: skip
    with output:
        for chunk in chunks:
            output.write(chunk)
    return Path(output.path)
