"""The Hugging Face format, both directions, streaming."""

from glm_jax.hf.names import (
    CHECKPOINT_TYPES,
    END_OF_TEXT,
    INDEX,
    WEIGHTS,
    abstract_parameters,
    name_table,
    parameter_count,
)
from glm_jax.hf.reading import Folder, import_checkpoint
from glm_jax.hf.writing import export_checkpoint, export_types, hf_tensors, main_type, plan_shards
from glm_jax.model.transformer import abstract_model

__all__ = [
    "CHECKPOINT_TYPES",
    "END_OF_TEXT",
    "INDEX",
    "WEIGHTS",
    "Folder",
    "abstract_model",
    "abstract_parameters",
    "export_checkpoint",
    "export_types",
    "hf_tensors",
    "import_checkpoint",
    "main_type",
    "name_table",
    "parameter_count",
    "plan_shards",
]
