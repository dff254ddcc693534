"""Sweeps: checked before anything runs, resumed, summed up. Runs are faked by their files; one test
trains for real.
"""

import csv
import json
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import toy

from experiments import entry, sweep_results, sweep_rewards
from experiments import sweep_runner as runner
from glm_jax.hf import parameter_count

SHIPPED = sorted(pathlib.Path("experiments/sweeps").glob("[!_]*.py"))
SWEEP = '''"""Two rates."""
CONFIG = "configs/tiny.py"
METRIC = "held_out_loss"
PLOT = {"x": "steps", "group": "optimizer.name", "challenger": "muon", "baseline": "adamw"}
RUNS = {
    "m": {"optimizer.name": "muon", "schedule.total_tokens": 20480},
    "a": {"optimizer.name": "adamw", "schedule.total_tokens": 20480},
}
'''


@pytest.fixture
def sweep_file(tmp_path):
    """sweep_file(old, new): path of SWEEP with one replacement."""

    def make(old="", new=""):
        assert old in SWEEP
        path = tmp_path / "sweep.py"
        path.write_text(SWEEP.replace(old, new) if old else SWEEP)
        return str(path)

    return make


def fake_run(run, losses, finished=True):
    """A run's folder as training leaves it: one evaluation a step."""
    (run.folder / "checkpoints" / str(run.num_steps if finished else 1)).mkdir(parents=True)
    (run.folder / "config.json").write_text(run.config.to_json())
    lines = [
        {"step": i, "tokens": 2048 * (i + 1), "tokens_per_second": 1024.0,
         "cross_entropy": loss + 0.1, "held_out_loss": loss,
         "held_out_bits_per_byte": loss / 2}
        for i, loss in enumerate(losses)
    ]  # fmt: skip
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_sweep_is_valid(path, tmp_path):
    sweep = runner.load_sweep(str(path))
    if sweep.metric in runner.REWARDS:
        places = {"start.workdir": "some/run"} | (
            {"control.difficulty": "some/file"} if path.stem == "rl_curriculum" else {}
        )
    else:
        places = {"data.paths": ("some/data",)}
    runs = runner.prepare(sweep, tmp_path, places)
    assert len(runs) >= 4 and len({r.num_steps for r in runs}) == 1
    assert all(
        runner.value_of(r.config, key) == value for r in runs for key, value in places.items()
    )


@pytest.mark.parametrize(
    "path", [p for p in SHIPPED if p.stem.startswith("rl_")], ids=lambda p: p.stem
)
def test_sweeps_of_rewards_differ_in_one_key_and_have_three_seeds(path, tmp_path):
    """And their two groups are those that are compared, each with the paper's claim beside it."""
    sweep = runner.load_sweep(str(path))
    keys = {key for overrides in sweep.runs.values() for key in overrides}
    varied = {key for key in keys if len({repr(o.get(key)) for o in sweep.runs.values()}) > 1}
    assert varied == {sweep.plot["group"], "loop.seed", "tasks.seed"} and sweep.plot["claim"]
    arms = [(str(o[sweep.plot["group"]]), o["loop.seed"]) for o in sweep.runs.values()]
    assert sorted(arms) == sorted(
        (sweep.plot[role], seed) for role in ("challenger", "baseline") for seed in range(3)
    )


def test_muon_and_adamw_differ_in_optimizer_and_rate_only(tmp_path):
    runs = runner.prepare(runner.load_sweep("experiments/sweeps/muon_vs_adamw.py"), tmp_path, {})
    rates = {"optimizer.name", "schedule.learning_rate", "schedule.final_learning_rate"}
    rest = {json.dumps({k: v for k, v in r.overrides.items() if k not in rates}) for r in runs}
    assert len(rest) == 1
    by_optimizer = {n: [r for r in runs if r.config.optimizer.name == n] for n in ("muon", "adamw")}
    assert [
        len({r.config.schedule.learning_rate for r in group}) for group in by_optimizer.values()
    ] == [3, 3]


def test_deep_and_wide_have_equal_parameters(tmp_path):
    runs = runner.prepare(runner.load_sweep("experiments/sweeps/deep_vs_wide.py"), tmp_path, {})
    configs = [entry.run_config(r.config).model for r in runs]
    counts = [parameter_count(c)["total"] for c in configs]
    assert max(counts) <= 1.01 * min(counts)
    assert max(c.num_layers for c in configs) >= 3 * min(c.num_layers for c in configs)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("schedule.total_tokens", "schedule.total_token", "total_tokens"),
        ('"optimizer.name": "muon"', '"optimizer.name": "moun"', "muon"),
        ('"schedule.total_tokens": 20480', '"schedule.total_tokens": "many"', "total_tokens"),
        ("METRIC", "METRICS", "METRIC"),
        ('"held_out_loss"', '"heldout_loss"', "held_out_loss"),
        ('"x": "steps"', '"x": "step"', "steps"),
        ('"group": "optimizer.name"', '"group": "optimizer.nam"', "optimizer.name"),
        ('"baseline": "adamw"', '"baseline": "adam"', "adamw"),
        ('"m":', '"../m":', "../m"),
        ('CONFIG = "configs/tiny.py"', 'CONFIG = "configs/tny.py"', "configs/tny.py"),
        ('"""Two rates."""', "", "docstring"),
    ],
)
def test_wrong_sweep_stops_before_anything_runs(sweep_file, tmp_path, old, new, complaint):
    with pytest.raises(ValueError, match=complaint):
        runner.prepare(runner.load_sweep(sweep_file(old, new)), tmp_path / "w", {})
    assert not (tmp_path / "w").exists()


def test_folder_of_another_run_is_refused(sweep_file, tmp_path):
    first = runner.prepare(runner.load_sweep(sweep_file()), tmp_path / "w", {})
    fake_run(first[1], [3.0])
    changed = runner.load_sweep(
        sweep_file(
            '"adamw", "schedule.total_tokens": 20480', '"adamw", "schedule.total_tokens": 40960'
        )
    )
    with pytest.raises(ValueError, match=r"schedule.total_tokens=20480, not 40960"):
        runner.prepare(changed, tmp_path / "w", {})
    # where the data lies may change
    runner.prepare(runner.load_sweep(sweep_file()), tmp_path / "w", {"data.paths": ("moved/data",)})


def test_command_carries_every_override(sweep_file, tmp_path):
    run = runner.prepare(runner.load_sweep(sweep_file()), tmp_path, {"data.paths": ("d",)})[0]
    command = run.command(progress=False)
    assert command[1:3] == ["-m", "experiments.train"]
    assert {
        "--config.optimizer.name=muon",
        "--config.schedule.total_tokens=20480",
        "--config.data.paths=('d',)",
    } <= set(command)


def test_results_name_the_share_of_steps(sweep_file, tmp_path):
    sweep = runner.load_sweep(sweep_file())
    runs = runner.prepare(sweep, tmp_path, {})
    fake_run(runs[0], [8, 7, 6, 5, 4.5, 4, 3.8, 3.7, 3.6, 3.65])
    fake_run(runs[1], [8, 7.5, 7, 6.5, 6, 5.5, 5, 4.5, 4.2, 4.0])
    text = sweep_results.write(sweep, runs, tmp_path)
    assert "at step 6 of 10: **60.0% of the steps**" in text
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [r["run"] for r in rows] == ["m", "a"]
    assert (
        rows[0]["final_held_out_loss"] == "3.65"
        and rows[0]["best_held_out_loss"] == "3.6"
        and rows[0]["steps"] == rows[0]["of"] == "10"
    )
    assert float(rows[0]["training_seconds"]) == 20.0 and rows[0]["tokens_per_second"] == "1024"
    assert (tmp_path / "results.png").stat().st_size > 10_000


def test_results_of_an_unfinished_sweep_say_so(sweep_file, tmp_path):
    sweep = runner.load_sweep(sweep_file())
    runs = runner.prepare(sweep, tmp_path, {})
    with pytest.raises(ValueError, match="none of the sweep's 2 runs has begun"):
        sweep_results.write(sweep, runs, tmp_path)
    fake_run(runs[0], [8, 7], finished=False)
    text = sweep_results.write(sweep, runs, tmp_path)
    assert "Not finished: m; not begun: 1" in text and "No comparison" in text


def test_better_baseline_is_never_reached(sweep_file, tmp_path):
    sweep = runner.load_sweep(sweep_file())
    runs = runner.prepare(sweep, tmp_path, {})
    fake_run(runs[0], [5.0] * 10)
    fake_run(runs[1], [4.0] * 10)
    assert "never reaches" in sweep_results.write(sweep, runs, tmp_path)


@pytest.mark.slow
def test_stopped_sweep_goes_on_and_skips_what_is_finished(tmp_path, corpus_folder):
    """Two tiny runs for real: stopped by SIGTERM in the first, then the same command to the end,
    then once more.
    """
    tiny = {f"model.{key}": value for key, value in toy.MODEL.items()} | {
        "data.batch_size": 2, "data.virtual_shards": 2, "data.sequence_length": 32,
        "loop.eval_every": 50, "loop.eval_batches": 1,
        "loop.checkpoint_every": 1000, "loop.sample_every": 0, "loop.sample_length": 4,
        "loop.sample_prompts": ("a",),
        "loop.fim_prompts": (),
    }  # fmt: skip
    tokens = 64 * 300
    runs = {
        "one": tiny | {"schedule.total_tokens": tokens},
        "two": tiny | {"schedule.total_tokens": 64 * 3},
    }
    runs = {
        n: r | {"schedule.warmup_tokens": 64, "schedule.decay_tokens": tokens}
        for n, r in runs.items()
    }
    head = (
        'CONFIG = "configs/tiny.py"\nMETRIC = "held_out_loss"\nPLOT = {"x": "tokens", "group":'
        ' "schedule.total_tokens"}'
    )
    file, work = tmp_path / "sweep.py", tmp_path / "w"
    file.write_text(f'"""Tiny."""\n{head}\nRUNS = {runs!r}\n')
    command = [
        sys.executable,
        "-m",
        "experiments.sweep",
        f"--sweep={file}",
        f"--workdir={work}",
        f"--data={corpus_folder}",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics, deadline = work / "one" / "metrics.jsonl", time.monotonic() + 240
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and "stopped in one" in output and not (work / "two").exists(), (
        output
    )
    saved = [int(p.name) for p in (work / "one" / "checkpoints").iterdir()]
    assert len(saved) == 1 and 0 < saved[0] < 300

    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(300)) and "resumed" in (work / "one" / "log.txt").read_text()
    assert all((work / f"results.{kind}").exists() for kind in ("csv", "md", "png"))

    again = subprocess.run(
        [*command, "--index=1"], check=False, capture_output=True, text=True, timeout=120
    )
    assert (
        again.returncode == 0
        and "two: finished before, skipped" in again.stdout
        and "one" not in again.stdout
    )


REWARDS = '''"""Two losses."""
CONFIG = "configs/rl_math_tiny.py"
METRIC = "held_out"
PLOT = {
    "x": "steps", "group": "grpo.aggregation", "challenger": "token", "baseline": "sequence",
    "claim": "tokens win",
}
RUNS = {
    f"{a}_{s}": {"grpo.aggregation": a, "loop.seed": s, "loop.steps": 20}
    for a in ("token", "sequence")
    for s in range(2)
}
'''


@pytest.mark.parametrize(
    ("token", "verdict"), [(0.9, "agrees"), (0.3, "disagrees"), (0.6, "shows no difference")]
)
def test_rewards_are_averaged_over_seeds_and_judged(tmp_path, token, verdict):
    (tmp_path / "sweep.py").write_text(REWARDS)
    sweep = runner.load_sweep(str(tmp_path / "sweep.py"))
    runs = runner.prepare(sweep, tmp_path, {"start.workdir": "somewhere"})
    assert runs[0].command(progress=False)[1:3] == ["-m", "experiments.rl"]
    with pytest.raises(ValueError, match="none of the sweep's 4 runs has begun"):
        sweep_rewards.write(sweep, runs, tmp_path)
    for run in runs:
        (run.folder / "checkpoints" / "20").mkdir(parents=True)
        end = (
            token if run.config.grpo.aggregation == "token" else 0.6
        ) + 0.02 * run.config.loop.seed
        lines = [
            {"step": i, "reward": i / 20, "seconds/train": 1.0, "seconds/generate": 0.5}
            for i in range(20)
        ]
        lines[0]["held_out"], lines[-1]["held_out_after"] = 0.1, end
        (run.folder / "metrics.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines)
        )
    text = sweep_rewards.write(sweep, runs, tmp_path)
    assert (
        f"ends at {token + 0.01:.3f} ± 0.010" in text
        and f"**this run of the experiment {verdict}" in text
        and "tokens win" in text
    )
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [r["run"] for r in rows] == ["token_0", "token_1", "sequence_0", "sequence_1"]
    assert (
        rows[0]["first_held_out"] == "0.1"
        and float(rows[0]["final_held_out"]) == token
        and rows[0]["seconds"] == "30.0"
    )
    assert (tmp_path / "results.png").stat().st_size > 10_000


def test_metric_must_fit_the_config(sweep_file, tmp_path):
    with pytest.raises(ValueError, match=r"METRIC of configs/tiny.py.*held_out_loss"):
        runner.prepare(runner.load_sweep(sweep_file('"held_out_loss"', '"held_out"')), tmp_path, {})
