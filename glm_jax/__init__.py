"""GLM-4.5 in JAX. In a notebook: `from glm_jax import load; model, tokenizer = load(path)`."""

from glm_jax.loading import load

__all__ = ["load"]
