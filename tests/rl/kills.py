"""Kills a run of reinforcement learning with SIGKILL in every phase of a step in turn, and compares
it with an undisturbed one.

    PYTHONPATH=tests:. python tests/rl/kills.py --kills=10

Every step's line of metrics.jsonl, measured seconds aside, every file of rollouts and of
evaluations, and the last weights must be equal bit for bit. All that a checkpoint must hold is at
work: a buffer of older rollouts with their experts, over-sampling, two pools of tasks, a
temperature that is swept, outputs that grow. Prints one line a kill and the verdict; exit code 1 on
any difference. Takes two to four minutes on two cores.
"""

from __future__ import annotations

import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time

import jax
import numpy as np
import toy
from absl import app, flags, logging

from configs import curate as curate_config
from data.curation import CurateConfig, curate
from glm_jax.envs import worker
from glm_jax.infer.engine import Engine
from glm_jax.rl.learner import Learner
from glm_jax.rl.loop import Run
from glm_jax.run.checkpoints import Checkpoints, finished_steps
from glm_jax.train.start import load_weights

KILLS = flags.DEFINE_integer("kills", 10, "SIGKILLs before the run is left to end.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Of the moments.")
START = flags.DEFINE_string(
    "start", None, "Work directory of a toy run to start from; by default one is made."
)
PHASES = {
    "train": (Learner, "learn"), "save": (Checkpoints, "save"),
    "generate": (worker.RolloutWorker, "rollouts"),
    "swap": (Engine, "set_weights"),
    "score": (worker.RolloutWorker, "judge"),
}  # fmt: skip
SAVE_EVERY, NEVER = 2, 10**9


# --- the run that dies ---


def run_and_die(phase: str, first: int, share: float, arguments: list[str]):
    """experiments.rl, which kills itself in its first `phase` from step number `first` on, after
    that share of the time it took before.
    """
    from experiments import entry, rl

    worker.verifiers.score = toy.parity
    worker.RolloutWorker.read = toy.read_anything
    owner, name = PHASES[phase]
    original, one_step, steps, seconds = getattr(owner, name), Run.one_step, [-1], [0.0]

    def die(moment):
        os.write(sys.stdout.fileno(), f"{moment} {phase} of step {steps[-1]}\n".encode())
        os.kill(os.getpid(), signal.SIGKILL)

    def counted(run):
        steps.append(run.step)
        return one_step(run)

    def die_inside(self, args):
        if phase == "save":
            while not any(self.folder.glob(f"{args[0]}.*")):
                time.sleep(0.001)
        time.sleep(share * (0.1 if phase == "save" else seconds[-1]))
        die("inside")

    def deadly(self, *args, **kwargs):
        dies, started = steps[-1] >= first, time.perf_counter()
        if dies:
            threading.Thread(target=die_inside, args=(self, args)).start()
        result = original(self, *args, **kwargs)
        seconds.append(time.perf_counter() - started)
        if dies:
            if phase == "save":
                self.wait()  # it returns while it writes
            die("at the end of")
        return result

    Run.one_step = counted
    setattr(owner, name, deadly)
    sys.argv[1:] = arguments
    entry.run(rl.main)


# --- who looks on ---


def start(
    root: pathlib.Path,
    workdir: pathlib.Path,
    steps: int,
    phase: str = "save",
    first: int = NEVER,
    share: float = 0.0,
):
    """Runs, or resumes, the run in workdir. Returns where it was killed; None where it came to its
    end.
    """
    overrides = toy.RL | {
        "start.workdir": START.value or root / "start", "tasks.train": (str(root / "train.jsonl"),),
        "tasks.held_out": (str(root / "held_out.jsonl"),), "loop.steps": steps,
        "loop.checkpoint_every": SAVE_EVERY, "loop.eval_every": 5,
        "loop.keep_checkpoints": 2, "loop.save_rollouts_every": 1, "rollout.over_sampling": 3.0,
        "rollout.max_waves": 3,
        "grpo.max_staleness": 2, "grpo.updates_per_step": 2, "grpo.replay_experts": True,
        "engine.keep_experts": True,
        "control.curriculum": "two_stage", "control.difficulty": root / "difficulty.jsonl",
        "control.plateau_window": 2,
        "control.temperatures": (1.0, 1.2), "control.length_stages": ((0, 4), (3, 6)),
    }  # fmt: skip
    arguments = ["--config=configs/rl_math_tiny.py", f"--workdir={workdir}", "--noprogress"]
    arguments += [f"--config.{key}={value}" for key, value in overrides.items()]
    command = [sys.executable, __file__, "die", phase, str(first), str(share), *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    if done.returncode != -signal.SIGKILL:
        raise RuntimeError(done.stderr[-2000:])
    return done.stdout.splitlines()[-1]


def write_inputs(root: pathlib.Path):
    toy.write_tasks(root / "train.jsonl", 0, 12)
    toy.write_tasks(root / "held_out.jsonl", 50, 3)
    difficulties = [
        f'{{"id": "{i}", "solved": {1 + 3 * (i < 6)}, "tried": 16}}\n' for i in range(12)
    ]
    (root / "difficulty.jsonl").write_text("".join(difficulties))
    if START.value is None:
        config = curate_config.get_config()
        config.update(source="files", files_root="data", vocab_size=320)
        curate(CurateConfig(**config.to_dict()), root / "data", progress=False)
        toy.pretrain(root / "data", root / "start")


def differences(one: pathlib.Path, other: pathlib.Path, steps: int) -> list[str]:
    """What two runs do not share."""
    expected, found = toy.records(one), toy.records(other)
    if not [r["step"] for r in expected] == [r["step"] for r in found] == list(range(steps)):
        raise RuntimeError(f"{len(expected)} and {len(found)} steps recorded, {steps} expected")
    at_work = {"groups_from_buffer", "groups_stale", "pool", "sweep/1.2", "updates"}
    idle = [name for name in at_work if not any(r.get(name) for r in expected)]
    if idle:
        raise RuntimeError(f"{idle} never came up in {steps} steps, so nothing was proven of them")
    found = [f"step {a['step']}" for a, b in zip(expected, found, strict=True) if a != b]
    for file in sorted(
        file for folder in ("rollouts", "held_out") for file in (one / folder).glob("*.jsonl")
    ):
        name = file.relative_to(one)
        found += [str(name)] if file.read_bytes() != (other / name).read_bytes() else []
    weights = [jax.tree.leaves(load_weights(workdir, steps)[1:]) for workdir in (one, other)]
    return found + [
        f"weight {i}"
        for i, (a, b) in enumerate(zip(*weights, strict=True))
        if not np.array_equal(a, b)
    ]


def main(argv: list[str]):
    del argv
    logging.get_absl_handler().setLevel("WARNING")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(".cache/jax").absolute()))
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    rng, begun = random.Random(SEED.value), time.monotonic()
    steps = SAVE_EVERY * KILLS.value + 6  # a kill lets about one more checkpoint come
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        write_inputs(root)
        undisturbed, killed = root / "undisturbed", root / "killed"
        start(root, undisturbed, steps)
        for kill in range(KILLS.value):
            phase = list(PHASES)[kill % len(PHASES)]
            newest = max(finished_steps(killed), default=0)
            where = start(
                root,
                killed,
                steps,
                phase,
                newest + SAVE_EVERY + rng.randrange(SAVE_EVERY),
                rng.random(),
            )
            if where is None:
                raise RuntimeError(f"the run ended before kill {kill + 1}")
            half = (
                ", a checkpoint half written" if any((killed / "checkpoints").glob("*tmp*")) else ""
            )
            print(f"kill {kill + 1}: {where}, resumed from step {newest}{half}", flush=True)
        newest = max(finished_steps(killed), default=0)
        start(root, killed, steps)
        found = differences(undisturbed, killed, steps)
    seconds = time.monotonic() - begun
    print(
        f"{KILLS.value} kills, then left to end from step {newest}: {len(found)} differences in"
        f" {steps} steps, {seconds:.0f} s"
    )
    print(*found, sep="\n", end="")
    sys.exit(bool(found))


if __name__ == "__main__":
    if sys.argv[1:2] == ["die"]:
        run_and_die(sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), sys.argv[5:])
    else:
        app.run(main)
