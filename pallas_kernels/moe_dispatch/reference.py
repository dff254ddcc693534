"""The routed feed-forward in plain jnp: the meaning that every implementation is tested against."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def routed_ffn(x_TD, expert_TK, weights_TK, gate_EDF, up_EDF, down_EFD):
    """As api.routed_ffn: every token through every expert, E / K times the needed work."""
    weights_TK = (
        jnp.ones(expert_TK.shape, jnp.float32)
        if weights_TK is None
        else weights_TK.astype(jnp.float32)
    )
    # An index outside of 0..E-1 is a row of zeros.
    weights_TE = jnp.einsum("tk,tke->te", weights_TK, jax.nn.one_hot(expert_TK, len(down_EFD)))
    gate, up = (jnp.einsum("td,edf->tef", x_TD, w) for w in (gate_EDF, up_EDF))
    y_TED = jnp.einsum("tef,efd->ted", jax.nn.silu(gate) * up, down_EFD)
    return jnp.einsum("te,ted->td", weights_TE, y_TED.astype(jnp.float32)).astype(x_TD.dtype)
