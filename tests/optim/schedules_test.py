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


def test_what_happens_at_the_very_token_where_a_phase_ends():
    config = dataclasses.replace(
        paper(), total_tokens=1_000, first_microbatches=1, last_microbatches=3,
        batch_ramp_tokens=300, switch_tokens=300, warmup_tokens=300, decay_tokens=800,
    )  # fmt: skip
    schedule = Schedule(config, 100)
    assert [schedule.microbatches(t) for t in (0, 99, 100, 199, 200, 299, 300, 301)] == [
        1, 1, 2, 2, 3, 3, 3, 3
    ]  # fmt: skip
    steps = [schedule[s] for s in range(schedule.num_steps)]
    assert [s.tokens for s in steps] == [0, 100, 300, 600, 900]
    assert [s.mtp_weight for s in steps] == [0.3, 0.3, 0.1, 0.1, 0.1]
    assert [s.bias_rate for s in steps] == [1e-3, 1e-3, 0.0, 0.0, 0.0]
    peak, final = config.learning_rate, config.final_learning_rate
    rates = [schedule.learning_rate(t) for t in (0, 299, 300, 550, 800, 801, 1_000)]
    assert rates == pytest.approx(
        [0, peak * 299 / 300, peak, (peak + final) / 2, final, final, final]
    )


def test_a_schedule_without_warmup_begins_at_the_peak():
    config = dataclasses.replace(paper(), warmup_tokens=0)
    assert Schedule(config, 4096 * 4096).learning_rate(0) == config.learning_rate


def test_impossible_schedules_are_named():
    same = paper().warmup_tokens
    for changes, problem in (
        ({"decay_tokens": same}, f"decay_tokens={same} greater than warmup_tokens={same}"),
        ({"total_tokens": 0}, "total_tokens=0 must be positive"),
        ({"first_microbatches": 0}, "first_microbatches=0"),
    ):
        with pytest.raises(ValueError, match=problem):
            dataclasses.replace(paper(), **changes)
    assert dataclasses.replace(paper(), decay_tokens=same + 1, total_tokens=1)
    with pytest.raises(ValueError, match="decay_tokens=5"):
        dataclasses.replace(paper(), decay_tokens=5)
    with pytest.raises(ValueError, match="first_microbatches=9"):
        dataclasses.replace(paper(), first_microbatches=9)
