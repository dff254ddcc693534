"""Sampling temperature under control against a fixed one, 40 steps of GRPO.

    python -m experiments.sweep --sweep=experiments/sweeps/rl_temperature.py --workdir=W \
        --set=start.workdir=SFT

SFT: a run of experiments.sft with configs/sft_tiny.py. Six runs, three seeds each, of about two
minutes on two cores.
"""

CONFIG = "configs/rl_math_tiny.py"
METRIC = "held_out"
PLOT = {
    "x": "steps",
    "group": "control.temperatures",
    "challenger": "(1.0, 1.2, 1.4)",
    "baseline": "(1.0,)",
    "claim": "raising the temperature where rewards stop rising keeps exploration up (section 3.2)",
}

_LOOP = {
    "loop.steps": 40,
    "loop.eval_every": 8,
    "loop.checkpoint_every": 40,
    "loop.save_rollouts_every": 20,
}
_PLATEAU = {"control.plateau_window": 5, "control.plateau_gain": 0.05}
_ARMS = {"fixed": (1.0,), "controlled": (1.0, 1.2, 1.4)}
RUNS = {
    f"{name}_{seed}": (
        {"control.temperatures": value, "loop.seed": seed, "tasks.seed": seed} | _LOOP | _PLATEAU
    )
    for name, value in _ARMS.items()
    for seed in range(3)
}
