import dataclasses

import pytest

from configs import glm45
from glm_jax.optim.schedules import Schedule, ScheduleConfig


def paper() -> ScheduleConfig:
    return ScheduleConfig(**glm45.get_config().schedule.to_dict())


def test_pretraining_schedule_of_the_paper():
    schedule = Schedule(paper(), 4096 * 4096)
    first, last = schedule[0], schedule[schedule.num_steps - 1]
    assert (first.microbatches, last.microbatches) == (1, 4)
    assert (first.mtp_weight, first.bias_rate) == (0.3, 1e-3)
    ramp_end = next(s for s in range(schedule.num_steps) if schedule[s].tokens >= 500e9)
    assert schedule[ramp_end].microbatches == 4 and schedule[ramp_end - 1].microbatches == 4
    assert {schedule[s].microbatches for s in range(0, ramp_end, 100)} == {1, 2, 3, 4}
    assert max(
        schedule[s].learning_rate for s in range(0, schedule.num_steps, 50)
    ) == pytest.approx(2.5e-4, rel=1e-3)


def test_weights_switch_at_their_token_count_and_cosine_ends_at_the_final_rate():
    config = dataclasses.replace(paper(), total_tokens=23_100_000_000_000)
    schedule = Schedule(config, 4096 * 4096)
    switch = next(
        s for s in range(schedule.num_steps) if schedule[s].tokens >= config.switch_tokens
    )
    assert (schedule[switch - 1].mtp_weight, schedule[switch].mtp_weight) == (0.3, 0.1)
    assert (schedule[switch - 1].bias_rate, schedule[switch].bias_rate) == (1e-3, 0.0)
    assert schedule[schedule.num_steps - 1].learning_rate == pytest.approx(2.5e-5, rel=1e-3)


def test_tokens_add_up_over_the_ramp():
    config = dataclasses.replace(
        paper(),
        total_tokens=10_000,
        batch_ramp_tokens=4_000,
        warmup_tokens=100,
        decay_tokens=10_000,
    )
    schedule = Schedule(config, 100)
    tokens = 0
    for step in range(schedule.num_steps):
        assert schedule[step].tokens == tokens
        tokens += schedule[step].microbatches * 100
    assert tokens >= 10_000 > schedule[schedule.num_steps - 1].tokens


def test_warmup_is_linear_and_the_first_step_moves():
    config = dataclasses.replace(
        paper(),
        total_tokens=1_000,
        batch_ramp_tokens=0,
        last_microbatches=1,
        warmup_tokens=400,
        decay_tokens=1_000,
    )
    rates = [Schedule(config, 100)[s].learning_rate for s in range(10)]
    assert rates[:3] == pytest.approx([2.5e-4 / 4, 2.5e-4 / 2, 2.5e-4 * 3 / 4])
    assert rates == sorted(rates[:4]) + sorted(rates[4:], reverse=True)


def test_impossible_schedules_are_named():
    with pytest.raises(ValueError, match="decay_tokens=5"):
        dataclasses.replace(paper(), decay_tokens=5)
    with pytest.raises(ValueError, match="first_microbatches=9"):
        dataclasses.replace(paper(), first_microbatches=9)
