"""Rollout workers as Ray actors: they sample what one engine would, and one that dies is replaced,
with nothing lost and nothing doubled.
"""

import threading
import time

import numpy as np
import pytest
import ray
import toy
from toy import records

from experiments import entry
from glm_jax.envs.episode import SamplingSpec
from glm_jax.infer.engine import Engine
from glm_jax.rl import loop, ray_source
from glm_jax.rl.source import InProcess
from glm_jax.rollouts.task import read_tasks
from glm_jax.sharding import make_mesh
from glm_jax.train.start import starting_state, starting_tokenizer
from glm_jax.train.state import TrainSpec, build_model

SPEC = SamplingSpec(group_size=2, max_new_tokens=6, temperature=1.0, seed=3, thinking=False)


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """Two CPUs, and the toy's parser and verifier in every process."""
    easy = {"worker_process_setup_hook": "tests.toy.judge_by_parity"}
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False,
        runtime_env=ray_source.ENVIRONMENT | easy,
    )  # fmt: skip
    yield
    ray.shutdown()


@pytest.fixture
def config(rl_config, monkeypatch):
    toy.judge_by_parity(monkeypatch.setattr)
    rl_config.rollout.update(asynchronous=True, workers=2, max_waves=4)
    rl_config.grpo.max_staleness = 2
    return rl_config


def opened(config):
    """RaySource, InProcess and the tasks of a config, with the weights that it starts from."""
    rl, start = entry.rl_config(config)
    mesh, tokenizer = make_mesh(rl.mesh, ray_source.jax.devices()[:1]), starting_tokenizer(start)
    state = starting_state(start, TrainSpec.create(rl.model, rl.optimizer), mesh, seed=0)
    model = build_model(rl.model, state.params, state.router)
    engine = Engine(model, rl.engine, tokenizer.decode)
    weights = ray_source.nnx.state(model)
    tasks = read_tasks(config.tasks.train[0])
    source = ray_source.RaySource(rl, tokenizer, weights, version=5)
    return source, InProcess(engine, tokenizer, version=5), tasks


def until_finished(source, count: int, seconds: float = 120.0) -> list:
    found, end = [], time.monotonic() + seconds
    while len(found) < count:
        assert time.monotonic() < end, f"only {len(found)} of {count} groups came"
        found += source.finished(timeout=1.0)
    return found


def test_workers_sample_what_one_engine_samples_though_some_die(config):
    source, alone, tasks = opened(config)
    tasks = tasks[:7]
    for number, task in enumerate(tasks):
        source.begin(number, task, SPEC)
    ray.kill(source.workers[0].actor)
    found = until_finished(source, 4)
    ray.kill(source.workers[1].actor)
    found += until_finished(source, 7 - len(found))
    assert sorted(number for number, _ in found) == list(range(7))
    assert source.finished(timeout=1.0) == [] and source.replaced == 2
    held_out = source.rollouts(tasks, SPEC, first=0)
    expected = alone.rollouts(tasks, SPEC, first=0)
    for groups in ([group for _, group in sorted(found, key=lambda pair: pair[0])], held_out):
        assert [g.task for g in groups] == [g.task for g in expected]
        for one, two in zip(groups, expected, strict=True):
            for a, b in zip(one.rollouts, two.rollouts, strict=True):
                np.testing.assert_array_equal(a.tokens, b.tokens)
                assert a.status is b.status and a.oldest == 5
    source.close()


def test_workers_that_die_one_after_the_other_end_the_run(config):
    source, *_ = opened(config)
    for worker in source.workers:
        ray.kill(worker.actor)
    source.config = None  # no engine can be made of it
    with pytest.raises(RuntimeError, match="^4 rollout workers died in turn before one sampled"):
        until_finished(source, 1)
    source.close()


@pytest.mark.parametrize(("resource", "amount"), [("TPU", 4.0), ("half", 0.25)])
def test_a_cluster_without_the_resources_is_refused_before_anything_is_written(
    config, tmp_path, resource, amount
):
    config.rollout.worker_resources = (("CPU", 1.0), (resource, amount))
    rl, start = entry.rl_config(config)
    needed = f"rollout.workers=2 need {2 * amount:g} {resource} .* which has 0"
    with pytest.raises(ValueError, match=needed):
        ray_source.connect(rl.rollout)
    with pytest.raises(ValueError, match=needed):
        loop.train(rl, start, tmp_path / "run", config_json="{}", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_though_its_workers_are_killed(config, tmp_path, monkeypatch):
    killed = []

    class Deadly(ray_source.RaySource):
        def set_weights(self, state, version):
            super().set_weights(state, version)
            if version in (2, 4):
                killed.append(version)
                ray.kill(self.workers[version // 2 - 1].actor)

    monkeypatch.setattr(ray_source, "RaySource", Deadly)
    config.loop.update(steps=6, checkpoint_every=3)
    rl, start = entry.rl_config(config)
    run = loop.open_run(rl, start, tmp_path / "run", config_json=config.to_json(), progress=False)
    assert run.loop() == 6 and killed == [2, 4]
    found = records(tmp_path / "run")
    assert all(r["staleness_max"] <= 2 for r in found if r["groups_trained"])
    assert sum(r["groups_trained"] for r in found) == run.collector.ledger.ends["trained"] >= 12
    run.collector.ledger.check()
    run.close()
    assert not any(thread.name == "rollouts" for thread in threading.enumerate())
