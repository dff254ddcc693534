"""Kills a training run with SIGKILL at random moments, half of them aimed into a save, and compares
it with an undisturbed one.

    PYTHONPATH=tests:. python tests/train/kills.py --kills=20

Every step's line of metrics.jsonl must be equal bit for bit, measured speeds aside. Prints one line
a kill and the verdict; exit code 1 on any difference. Takes 10 to 20 minutes on two cores.
"""

from __future__ import annotations

import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time

import toy
from absl import app, flags

from configs import curate as curate_config
from data.curation import CurateConfig, curate

KILLS = flags.DEFINE_integer("kills", 20, "SIGKILLs before the run is left to end.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Of the moments.")
STEPS, TOKENS = 800, 8 * 64


def command(data: pathlib.Path, workdir: pathlib.Path) -> list[str]:
    overrides = {f"model.{key}": value for key, value in toy.MODEL.items()}
    overrides |= {
        "data.paths": (str(data),), "data.sequence_length": 64,
        "schedule.total_tokens": STEPS * TOKENS,
        "schedule.decay_tokens": STEPS * TOKENS, "schedule.warmup_tokens": TOKENS,
        "loop.checkpoint_every": 4,
        "loop.eval_every": 100, "loop.eval_batches": 1, "loop.sample_every": 0,
    }  # fmt: skip
    flags_ = [f"--config.{key}={value}" for key, value in overrides.items()]
    return [
        sys.executable,
        "-m",
        "experiments.train",
        "--config=configs/tiny.py",
        f"--workdir={workdir}",
        "--noprogress",
        *flags_,
    ]


def kill_once(
    arguments: list[str], workdir: pathlib.Path, *, inside_save: bool, rng: random.Random
) -> str | None:
    """Starts the run and kills it; says where it was, None where it had ended before."""
    before = set((workdir / "checkpoints").glob("*"))
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + rng.uniform(1, 25)
    while process.poll() is None:
        half_written = [p for p in (workdir / "checkpoints").glob("*tmp*") if p not in before]
        if inside_save and half_written:
            time.sleep(rng.uniform(0, 0.05))
            break
        if not inside_save and time.monotonic() > deadline:
            break
        time.sleep(0.002)
    if process.poll() is not None:
        if process.returncode:
            raise RuntimeError(process.stderr.read().decode())
        return None
    process.kill()
    process.wait()
    # without what an earlier kill left
    half_written = set((workdir / "checkpoints").glob("*tmp*")) - before
    return "inside a save" if half_written else "outside a save"


def main(argv: list[str]):
    del argv
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(".cache/jax").absolute()))
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
    rng = random.Random(SEED.value)
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        config = curate_config.get_config()
        config.update(source="files", files_root="data", vocab_size=320)
        curate(CurateConfig(**config.to_dict()), root / "data", progress=False)
        undisturbed, killed = root / "undisturbed", root / "killed"
        subprocess.run(command(root / "data", undisturbed), check=True)
        kills = 0
        while kills < KILLS.value:
            where = kill_once(
                command(root / "data", killed), killed, inside_save=bool(kills % 2), rng=rng
            )
            if where is None:
                raise RuntimeError(f"the run ended after {kills} kills: give it more steps")
            kills += 1
            steps = len(toy.records(killed)) if (killed / "metrics.jsonl").exists() else 0
            print(f"kill {kills}: {where}, {steps} steps recorded", flush=True)
        subprocess.run(command(root / "data", killed), check=True)
        expected, found = toy.records(undisturbed), toy.records(killed)
    differences = [a["step"] for a, b in zip(expected, found, strict=False) if a != b]
    if len(expected) != STEPS or len(found) != STEPS:
        raise RuntimeError(f"{len(expected)} and {len(found)} steps recorded, {STEPS} expected")
    print(f"{kills} kills, {len(differences)} differences in {STEPS} steps {differences or ''}")
    sys.exit(bool(differences))


if __name__ == "__main__":
    app.run(main)
