"""GRPO's loss and gradient against a plain float64 loop of the formula, from rewards to packed
rows; advantages, clip and masks.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from glm_jax.losses import chunked_token_loss
from glm_jax.rl.advantages import advantages, token_weights
from glm_jax.rl.batch import TokenInputs, pack, place
from glm_jax.rl.config import GrpoConfig
from glm_jax.rl.step import observe, token_loss
from glm_jax.rollouts.rollout import Group, Rollout, RolloutStatus
from glm_jax.rollouts.task import Reward, Task

VOCAB, WIDTH = 11, 6
GRPO = dict(
    learning_rate=1e-3, warmup_updates=0, normalize_std=True, clip_low=0.2, clip_high=0.28,
    aggregation="token", old_logprobs="trainer",
    importance_cap=1.5, replay_experts=False, updates_per_step=1, max_staleness=0, mtp_weight=0.0,
    bias_rate=0.0, balance_weight=0.0,
    row_length=16, rows=2,
)  # fmt: skip


def make_groups(seed=0, num_groups=4, size=3):
    """Rollouts with prompts, tokens of an environment in between, several lengths, one truncated
    and one that an environment broke.
    """
    rng = np.random.default_rng(seed)
    groups = []
    for number in range(num_groups):
        task = Task(str(number), "g", "puzzle", ({"role": "user", "content": "?"},), 1)
        rollouts = []
        for sample in range(size):
            mask = (
                [False] * rng.integers(1, 4)
                + [True] * rng.integers(1, 5)
                + [False] * rng.integers(0, 2)
                + [True] * rng.integers(1, 3)
            )
            length = len(mask)
            status = (
                RolloutStatus.TRUNCATED if (number, sample) == (0, 1) else RolloutStatus.COMPLETED
            )
            status = RolloutStatus.ENVIRONMENT_ERROR if (number, sample) == (1, 0) else status
            rollouts.append(Rollout(
                task, rng.integers(0, VOCAB, length).tolist(), mask,
                np.where(mask, -rng.gamma(2, 1, length), 0).tolist(),
                np.where(mask, 0, -1).tolist(), status, Reward(float(rng.integers(0, 3)) / 2, {}),
            ))  # fmt: skip
        groups.append(Group(task, rollouts))
    return groups


def ours(config, groups, embedding, head, old, mask_truncated):
    """(loss, gradients) by the packed batch; a token's state is its embedding, so that every
    position has logits of its own.
    """
    pairs = [pair for g in groups for pair in advantages(g, normalize_std=config.normalize_std)]
    batch, used = pack(
        pairs, row_length=config.row_length, rows=config.rows, most=len(pairs),
        aggregation=config.aggregation,
        mask_truncated=mask_truncated, replay=False,
    )  # fmt: skip
    assert not batch.segment_ids[used:].any() and batch.segment_ids[used - 1].any()
    flat = jax.tree.map(lambda x: x.reshape(-1, config.row_length), batch)
    inputs = flat.inputs
    if old is not None:
        inputs = dataclasses.replace(inputs, old_logprobs=logprobs_of(*old, flat))

    def loss(embedding, head):
        return chunked_token_loss(
            functools.partial(token_loss, config),
            embedding[flat.tokens],
            head,
            flat.targets,
            inputs,
            5,
            False,
        )[0]

    return jax.value_and_grad(loss, argnums=(0, 1))(
        jnp.asarray(embedding, jnp.float32), jnp.asarray(head, jnp.float32)
    )


def logprobs_of(embedding, head, flat):
    logits = embedding[flat.tokens] @ head
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.take_along_axis(logprobs, flat.targets[..., None], -1)[..., 0].astype(np.float32)


def formula(config, groups, embedding, head, old, mask_truncated):
    """The same as a loop over groups, rollouts and tokens in float64, straight from the formula;
    gradients by torch.
    """
    embedding, head = (
        torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (embedding, head)
    )
    terms = []  # per rollout: its tokens' gains
    for group in groups:
        teaching = [r for r in group.rollouts if r.status is not RolloutStatus.ENVIRONMENT_ERROR]
        mean = sum(r.reward.value for r in teaching) / len(teaching)
        std = (sum((r.reward.value - mean) ** 2 for r in teaching) / len(teaching)) ** 0.5
        for rollout in teaching:
            if mask_truncated and rollout.status is RolloutStatus.TRUNCATED:
                continue
            advantage = (rollout.reward.value - mean) / (std + 1e-6 if config.normalize_std else 1)
            gains = []
            for i in range(1, len(rollout.tokens)):
                if not rollout.mask[i]:
                    continue
                new = torch.log_softmax(embedding[rollout.tokens[i - 1]] @ head, 0)[
                    rollout.tokens[i]
                ]
                engine = rollout.logprobs[i]
                before = new.detach() if old is None else torch.log_softmax(
                    torch.tensor(old[0][rollout.tokens[i - 1]] @ old[1]),
                    0)[rollout.tokens[i]]  # fmt: skip
                if config.old_logprobs == "engine":
                    before = torch.tensor(engine, dtype=torch.float64)
                ratio = torch.exp(new - before)
                weight = (
                    min(float(torch.exp(before - engine)), config.importance_cap)
                    if config.importance_cap
                    else 1.0
                )
                clipped = torch.clamp(ratio, 1 - config.clip_low, 1 + config.clip_high)
                gains.append(weight * torch.minimum(ratio * advantage, clipped * advantage))
            terms.append(gains)
    if config.aggregation == "token":
        loss = -sum(sum(gains) for gains in terms) / sum(len(gains) for gains in terms)
    else:
        loss = -sum(sum(gains) / len(gains) for gains in terms) / len(terms)
    loss.backward()
    return loss.item(), embedding.grad.numpy(), head.grad.numpy()


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
@pytest.mark.parametrize(
    ("changes", "with_old", "mask_truncated"),
    [
        ({}, True, False),
        ({}, False, True),
        ({"importance_cap": 0.0, "normalize_std": False}, True, True),
        ({"importance_cap": 0.0, "old_logprobs": "engine"}, False, False),
    ],
)
def test_loss_and_gradient_are_those_of_the_formula(aggregation, changes, with_old, mask_truncated):
    config = GrpoConfig(**GRPO | {"aggregation": aggregation} | changes)
    rng = np.random.default_rng(1)
    embedding, head = rng.normal(size=(VOCAB, WIDTH)), rng.normal(size=(WIDTH, VOCAB))
    old = (embedding + 0.1 * rng.normal(size=embedding.shape), head) if with_old else None
    groups = make_groups()
    loss, gradients = ours(config, groups, embedding, head, old, mask_truncated)
    expected, *expected_gradients = formula(config, groups, embedding, head, old, mask_truncated)
    assert abs(float(loss) - expected) < 1e-6 * max(1, abs(expected))
    for mine, theirs in zip(gradients, expected_gradients, strict=True):
        assert np.linalg.norm(theirs) > 1e-3
        assert np.linalg.norm(np.asarray(mine, np.float64) - theirs) <= 1e-6 * np.linalg.norm(
            theirs
        )


def test_advantages_are_relative_to_the_rollouts_that_count():
    group = make_groups()[0]
    for rollout, value in zip(group.rollouts, (1.0, 0.0, 0.5), strict=True):
        rollout.reward = Reward(value, {})
    assert [a for _, a in advantages(group, normalize_std=False)] == [0.5, -0.5, 0.0]
    assert np.allclose(
        [a for _, a in advantages(group, normalize_std=True)],
        np.array([1, -1, 0]) * 1.5**0.5,
        atol=1e-5,
    )
    group.rollouts[0].status = RolloutStatus.ABORTED
    assert [a for _, a in advantages(group, normalize_std=False)] == [-0.25, 0.25]
    group.rollouts[1].reward = group.rollouts[2].reward = Reward(1.0, {})
    assert not group.has_variance
    assert [a for _, a in advantages(group, normalize_std=True)] == [0.0, 0.0]


def test_a_token_weighs_the_same_or_a_rollout_does():
    assert token_weights([1, 3], "token") == [0.25, 0.25]
    assert np.allclose(token_weights([1, 3], "sequence"), [0.5, 1 / 6])
    # what is masked does not count as a rollout
    assert np.allclose(token_weights([0, 4], "sequence"), [1, 1 / 4])
    for aggregation in ("token", "sequence"):
        assert token_weights([1], aggregation) == [1.0]
        assert token_weights([0, 0], aggregation) == [1.0, 1.0]  # of no token: nothing to divide


def test_beyond_the_clip_there_is_no_gradient_outwards():
    config = GrpoConfig(**GRPO | {"importance_cap": 0.0})

    def slopes(advantage):
        def loss(logprobs):
            n = len(logprobs)
            inputs = TokenInputs(
                loss_weights=jnp.ones(n),
                advantages=jnp.full(n, advantage),
                engine_logprobs=jnp.zeros(n),
                old_logprobs=jnp.zeros(n),
            )
            return jnp.sum(token_loss(config, logprobs, inputs))

        return jax.grad(loss)(jnp.log(jnp.array([0.7, 0.9, 1.25, 1.4])))

    assert np.allclose(slopes(1.0), [-0.7, -0.9, -1.25, 0])  # up to 1.28 upwards
    assert np.allclose(slopes(-1.0), [0, 0.9, 1.25, 1.4])  # down to 0.8 downwards


def test_what_the_model_did_not_draw_has_no_weight():
    groups = make_groups()
    pairs = [p for g in groups for p in advantages(g, normalize_std=True)]
    batch, _ = pack(
        pairs,
        row_length=16,
        rows=2,
        most=len(pairs),
        aggregation="token",
        mask_truncated=False,
        replay=False,
    )
    assert np.isclose(batch.inputs.loss_weights.sum(), 1)
    drawn = sum(r.num_sampled for g in groups for r in g.learnable)
    assert (batch.inputs.loss_weights > 0).sum() == drawn
    assert (batch.segment_ids[batch.inputs.loss_weights > 0] > 0).all()
    assert (
        sum(len(r.tokens) - 1 for g in groups for r in g.learnable) == (batch.segment_ids > 0).sum()
    )
    for name in ("advantages", "engine_logprobs"):
        assert (getattr(batch.inputs, name)[batch.inputs.loss_weights == 0] == 0).all()


def test_experts_lie_along_their_tokens():
    groups = make_groups(num_groups=2)
    rng = np.random.default_rng(0)
    for group in groups:
        for rollout in group.rollouts:
            rollout.experts = rng.integers(0, 8, (len(rollout.tokens) - 1, 3, 2)).astype(np.int16)
    pairs = [p for g in groups for p in advantages(g, normalize_std=True)]
    batch, _ = pack(
        pairs,
        row_length=16,
        rows=2,
        most=len(pairs),
        aggregation="token",
        mask_truncated=False,
        replay=True,
    )
    assert batch.experts.shape == (*batch.tokens.shape[:1], 3, 2, 16, 2)
    assert ((batch.experts[:, 0, ..., 0] >= 0) == (batch.segment_ids > 0)).all()
    found = batch.experts.swapaxes(1, 2).reshape(-1, 3, 16, 2)
    tokens, segments = (x.reshape(-1, 16) for x in (batch.tokens, batch.segment_ids))
    for rollout, _ in pairs:
        where = [
            (row, s) for row in range(len(tokens)) for s in set(segments[row]) - {0}
            if np.array_equal(tokens[row][segments[row] == s], rollout.tokens[:-1])
        ]  # fmt: skip
        assert any(
            (found[row][:, segments[row] == s].swapaxes(0, 1) == rollout.experts).all()
            for row, s in where
        )


def test_replay_needs_the_experts_of_every_rollout():
    """A rollout without any would be routed by the trainer, and nobody would know."""
    rollouts = make_groups()[0].rollouts[:2]
    rollouts[0].experts = np.zeros((len(rollouts[0].tokens) - 1, 3, 2), np.int16)
    rollouts[1].experts = None
    for chosen in (rollouts, rollouts[::-1], rollouts[1:]):
        with pytest.raises(ValueError, match="replay needs rollouts of an engine with keep_exp"):
            pack(
                [(rollout, 1.0) for rollout in chosen],
                row_length=64, rows=1, most=2,
                aggregation="token", mask_truncated=False, replay=True,
            )  # fmt: skip


def test_rows_are_filled_and_nothing_is_lost():
    lengths = np.random.default_rng(0).integers(1, 60, 100).tolist()
    rows = place(lengths, 64)
    assert sorted(i for row in rows for i in row) == list(range(100))
    assert all(sum(lengths[i] for i in row) <= 64 for row in rows)
    assert len(rows) <= 1.1 * sum(lengths) / 64 + 1
    with pytest.raises(ValueError, match="does not fit into row_length=3"):
        pack(
            [(make_groups()[0].rollouts[0], 1.0)],
            row_length=3,
            rows=1,
            most=1,
            aggregation="token",
            mask_truncated=False,
            replay=False,
        )


@pytest.mark.parametrize(
    ("most", "rows", "microbatches"), [(1, 1, 1), (5, 2, 3), (6, 2, 3), (7, 3, 3), (2, 8, 1)]
)
def test_a_batch_has_room_for_a_row_each_and_says_how_much_is_used(most, rows, microbatches):
    """One program for every step: its size follows `most`, whatever comes."""
    group = make_groups(num_groups=1)[0]
    for count in {1, min(most, 3)}:
        pairs = [(rollout, 1.0) for rollout in group.rollouts[:count]]
        longest = max(len(rollout.tokens) for rollout, _ in pairs)
        batch, used = pack(
            pairs, row_length=longest, rows=rows, most=most, aggregation="token",
            mask_truncated=False, replay=False,
        )  # fmt: skip
        assert {x.shape for x in batch.arrays().values()} == {(microbatches, rows, longest)}
        filled = batch.segment_ids.any(axis=(1, 2))
        assert filled.tolist() == [i < used for i in range(microbatches)]


def test_what_is_observed():
    config = GrpoConfig(**GRPO)
    inputs = TokenInputs(
        loss_weights=jnp.array([0.25, 0.25, 0.5, 0.0]),
        advantages=jnp.array([1.0, -1.0, 1.0, 1.0]),
        engine_logprobs=jnp.log(jnp.array([0.5, 0.25, 0.5, 0.1])),
        old_logprobs=jnp.log(jnp.array([0.5, 0.5, 0.5, 0.5])),
    )
    seen = observe(
        config, jnp.log(jnp.array([0.75, 0.75, 0.5, 0.9])), jnp.array([1.0, 2.0, 3.0, 9.0]), inputs
    )
    assert np.isclose(seen["entropy"], 2.25)
    assert np.isclose(seen["clip_share"], 0.25)  # only the first moves outwards beyond the clip
    assert np.isclose(seen["importance"], 0.25 + 0.25 * 1.5 + 0.5)
    assert np.isclose(seen["importance_capped"], 0.25)
    assert np.isclose(seen["difference_max"], np.log(2))
