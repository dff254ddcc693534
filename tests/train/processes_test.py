"""Several real processes: they read their own parts of the rows, stop at one step whichever of them
gets the signal, and go on, in any number, as one process would.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
import types

import pytest
from launching import SMALL, Launch, finish, flags
from toy import records

from experiments import flag_groups
from glm_jax.run.checkpoints import finished_steps

ROW, MORE = 8 * 64, 3  # tokens of a step; steps after the stop


@pytest.fixture(scope="module")
def command(corpus_folder):
    """command(workdir, steps) -> arguments of a run on a mesh of 2 x 2, whose both axes' devices
    exchange, and the first of which crosses two processes.
    """

    def arguments(workdir, steps):
        settings = SMALL | {
            "data.paths": (str(corpus_folder),), "mesh.data": 1, "mesh.fsdp": 2, "mesh.expert": 2,
            "schedule.total_tokens": steps * ROW, "schedule.decay_tokens": 10**6,
            "schedule.switch_tokens": 10**6, "schedule.warmup_tokens": ROW,
            "loop.checkpoint_every": 10**6, "loop.eval_every": 0, "loop.eval_batches": 2,
        }  # fmt: skip
        return ["--config=configs/tiny.py", f"--workdir={workdir}", *flags(settings)]

    return arguments


@pytest.fixture(scope="module")
def stopped(command, tmp_path_factory):
    """(work directory, step) of a run in two processes, one of which got SIGTERM."""
    workdir = tmp_path_factory.mktemp("stopped") / "run"
    arguments = command(workdir, 10**6)
    metrics = workdir / "metrics.jsonl"
    with Launch(workdir.with_name("log"), "experiments.train", arguments, count=2) as launch:
        launch.until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2)
        launch.processes[1].send_signal(signal.SIGTERM)
        assert launch.ends() == [0, 0], launch.said()
        said = launch.said()
    (step,) = finished_steps(workdir)
    assert said.count(f"{step} steps done") == 2
    assert [r["step"] for r in records(workdir)] == list(range(step))
    return workdir, step


@pytest.fixture(scope="module")
def whole(command, stopped, tmp_path_factory):
    """Work directory of a run in one process, never stopped."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    finish(
        workdir.with_name("log"),
        "experiments.train",
        command(workdir, stopped[1] + MORE),
        count=1,
    )
    return workdir


def steps(workdir):
    """Records of all steps, without what is recorded only where a checkpoint is saved."""
    return [{k: v for k, v in r.items() if k != "router_bias"} for r in records(workdir)]


def progress(workdir, step):
    """Of a checkpoint: where every virtual shard is, and the tokens."""
    return json.loads((workdir / "checkpoints" / str(step) / "data" / "metadata").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 1])
def test_processes_stop_together_and_go_on_as_one_process_would(
    command, stopped, whole, tmp_path, count
):
    """Bit for bit: rows, and so losses, gradients, held-out loss, and positions in the data."""
    workdir, last = tmp_path / "run", stopped[1] + MORE
    shutil.copytree(stopped[0], workdir)
    finish(tmp_path / "log", "experiments.train", command(workdir, last), count=count)
    assert steps(workdir) == steps(whole)
    assert records(workdir)[-1] == records(whole)[-1] and "held_out_loss" in records(whole)[-1]
    assert len(steps(whole)) == last
    assert progress(workdir, last) == progress(whole, last)
    assert sorted(progress(workdir, last)["data"]["shards"], key=int) == [str(i) for i in range(8)]


def test_what_runs_in_one_process_says_so_before_anything_is_written(tmp_path):
    arguments = ["--config=configs/rl_math_tiny.py", f"--workdir={tmp_path / 'run'}"]
    with Launch(tmp_path / "log", "experiments.rl", arguments, count=2) as launch:
        assert launch.ends() == [1, 1], launch.said()
    for index, file in enumerate(launch.logs):
        message = f"error: experiments.rl runs in one process.* of the processes {1 - index}, too"
        assert re.search(message, file.read_text())
    assert not (tmp_path / "run").exists()


def test_an_error_of_one_process_ends_the_others(command, tmp_path):
    """They would wait for it in the first collective; those of process 0's coordinator end at once,
    others when they miss its heartbeats.
    """
    arguments = command(tmp_path / "run", 10**6)
    further = {0: ["--config.data.sequence_length=65"]}
    begun = time.monotonic()
    with Launch(
        tmp_path / "log", "experiments.train", arguments, count=2, further=further
    ) as launch:
        first, second = launch.ends()
    assert first == -signal.SIGALRM and second != 0
    assert time.monotonic() - begun < 100
    assert re.search("error: data.sequence_length=65 exceeds", launch.logs[0].read_text())


@pytest.mark.parametrize(
    "given", [(True, "host:1", 2, None), (True, None, 2, 0), (False, "host:1", 2, 0)]
)
def test_flags_that_do_not_make_a_run_of_several_processes_are_refused(given):
    with pytest.raises(ValueError, match="--coordinator, --num_processes and --process_index go"):
        flag_groups.Processes(*[types.SimpleNamespace(value=value) for value in given]).start()
