"""Fill-in-the-middle (Bavarian et al., arXiv 2207.14255): a document is cut at two places and its
middle moved to the end.

    PSM   <|code_prefix|> prefix <|code_suffix|> suffix <|code_middle|> middle
    SPM   <|code_prefix|> <|code_suffix|> suffix <|code_middle|> prefix middle

SPM is the paper's variant for training jointly with PSM (its appendix D): the suffix comes first
and the model writes the middle right after the prefix. Both begin with <|code_prefix|>, so one
prompt format serves at sampling time.
"""

import numpy as np

from data.tokenizer import Tokenizer

LEVELS = ("character", "token")


def document_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """Randomness of one document in one epoch: a function of its three arguments alone."""
    return np.random.default_rng([seed, epoch, index])


def rearrange(
    ids: np.ndarray,
    tokenizer: Tokenizer,
    rng: np.random.Generator,
    rate: float,
    psm_fraction: float,
    level: str,
) -> np.ndarray:
    """Returns `ids` unchanged, or with probability `rate` as PSM (share `psm_fraction` of those) or
    SPM.

    ids: int32 [n], one document without start or end tokens. level: 'character' cuts the text at
    two uniform character positions and encodes the three pieces anew, so that the model learns to
    continue inside a token; 'token' cuts between tokens. Returns int32 [m]. Raises ValueError for
    an unknown level.
    """
    if level not in LEVELS:
        raise ValueError(f"fim_level={level!r}; valid: {list(LEVELS)}")
    # Sampled in a fixed order and always, so that a changed rate or share leaves the other samples
    # as they were.
    is_fim, is_psm = rng.random() < rate, rng.random() < psm_fraction
    if not is_fim:
        return ids
    if level == "character":
        text = tokenizer.decode(ids.tolist())
        prefix, middle, suffix = tokenizer.encode_batch(_cut(text, rng))
    else:
        prefix, middle, suffix = (piece.tolist() for piece in _cut(ids, rng))
    prefix_id, middle_id, suffix_id = tokenizer.fim_ids
    if is_psm:
        pieces = [prefix_id, *prefix, suffix_id, *suffix, middle_id, *middle]
    else:
        pieces = [prefix_id, suffix_id, *suffix, middle_id, *prefix, *middle]
    return np.asarray(pieces, np.int32)


def fim_prompt(tokenizer: Tokenizer, prefix: str, suffix: str) -> list[int]:
    """Ids after which a model trained on PSM writes the text between `prefix` and `suffix`, then
    `<|endoftext|>`.
    """
    prefix_id, middle_id, suffix_id = tokenizer.fim_ids
    prefix_ids, suffix_ids = tokenizer.encode_batch([prefix, suffix])
    return [*tokenizer.start_ids, prefix_id, *prefix_ids, suffix_id, *suffix_ids, middle_id]


def _cut(document, rng: np.random.Generator):
    """Three slices (prefix, middle, suffix) of a sequence, cut at two uniform positions out of
    0..n.
    """
    first, second = np.sort(rng.integers(0, len(document), size=2, endpoint=True))
    return document[:first], document[first:second], document[second:]
