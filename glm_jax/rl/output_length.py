"""How long an output may be: one stage at the full length, as the paper found better, or stages
that grow (Figure 6).
"""

from __future__ import annotations

from collections.abc import Sequence


def output_length(stages: Sequence[tuple[int, int]], step: int) -> int:
    """Tokens an output may have in a step; stages: (first step, tokens), rising."""
    return next(tokens for first, tokens in reversed(stages) if step >= first)
