"""What an engine is made for: sizes, formats, and whether they fit a model and a mesh."""

from __future__ import annotations

import dataclasses

from jax.sharding import Mesh

from glm_jax.config import ModelConfig, check_choice
from glm_jax.infer import quantize
from glm_jax.sharding import one_process, parts

CACHE_DTYPES = ("compute", "float32", "bfloat16", "float8_e4m3fn")


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Sizes of the engine. What runs on the device compiles once for each size of batch (powers of
    two from min_rows on) that occurs; a prefill also for each length of chunk (min_chunk, times 4,
    times 16, ...) and of page table (powers of two from MIN_TABLE on).
    """

    # most tokens of a request, prompt and continuation; at most the model's max_length
    context: int
    num_rows: int  # requests in the batch at a time
    # rows of the smallest batch: more compiles less, and computes more where few requests run
    min_rows: int
    page_size: int  # tokens
    num_pages: int
    prefill_chunk: int  # most tokens of a row in one prefill call
    min_chunk: int  # tokens of the shortest prefill call: the same trade
    # tokens sampled in one call before the host looks: more is faster, and later to let requests in
    decode_steps: int
    # guessed by the MTP block and verified in one pass of the trunk; 0: no speculation
    draft_tokens: int
    # quantize.FORMATS: 'compute' precision, 'fp8' (128 x 128 blocks), 'int8' (columns)
    weights: str
    cache_dtype: str  # of keys and values: 'compute' precision or one of CACHE_DTYPES
    keep_experts: bool  # give every request the experts that its tokens were routed to

    def __post_init__(self):
        check_choice("engine.weights", self.weights, quantize.FORMATS)
        check_choice("engine.cache_dtype", self.cache_dtype, CACHE_DTYPES)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (
                type(value) is not int or value < (field.name != "draft_tokens")
            ):
                raise ValueError(
                    f"engine.{field.name}={value!r} must be a positive integer; draft_tokens may"
                    " be 0"
                )
        for small, large in (("min_rows", "num_rows"), ("min_chunk", "prefill_chunk")):
            if getattr(self, small) > getattr(self, large):
                raise ValueError(
                    f"engine.{small}={getattr(self, small)} exceeds {large}={getattr(self, large)}"
                )
        longest = self.context + self.draft_tokens
        if self.num_pages * self.page_size < longest:
            raise ValueError(
                f"engine.num_pages={self.num_pages} of {self.page_size} tokens hold no request of"
                f" {longest} with its drafts"
            )

    def check(self, model: ModelConfig, mesh: Mesh | None):
        """Raises ValueError where an engine of these sizes cannot run the model, or be split over
        the mesh, or where the mesh has devices of other processes.
        """
        if mesh is not None:
            one_process("the engine", mesh.devices.flat)
        self.check_sizes(model, mesh)

    def check_sizes(self, model: ModelConfig, mesh: Mesh | None):
        """The same, whoever has the mesh's devices."""
        shards = num_shards(mesh)
        for field in ("num_rows", "num_pages"):
            if getattr(self, field) % shards:
                raise ValueError(
                    f"engine.{field}={getattr(self, field)} cannot be split over {shards} shards of"
                    " the mesh"
                )
        if self.num_pages // shards * self.page_size < self.context + self.draft_tokens:
            raise ValueError(
                f"engine.num_pages={self.num_pages} over {shards} shards hold no request of"
                f" {self.context} tokens"
            )
        if self.context > model.max_length:
            raise ValueError(
                f"engine.context={self.context} exceeds the model's max_length={model.max_length}"
            )
        if self.draft_tokens and not model.num_mtp_layers:
            raise ValueError(
                f"engine.draft_tokens={self.draft_tokens}: this model has no MTP block"
            )


def num_shards(mesh: Mesh | None) -> int:
    """Parts that rows and pages are split into, by the rules in use."""
    return 1 if mesh is None else parts("batch", mesh)
