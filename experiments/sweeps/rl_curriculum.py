"""Moderate tasks, then hardly ever solved ones, against moderate tasks only (Figure 5), 40 steps of
GRPO.

    python -m experiments.sweep --sweep=experiments/sweeps/rl_curriculum.py --workdir=W \
        --set=start.workdir=SFT \
        --set=control.difficulty=DIFFICULTY

SFT: a run of experiments.sft with configs/sft_tiny.py. Its difficulty file, for DIFFICULTY:

    python -m experiments.difficulty --workdir=SFT --tasks=puzzle:aiw:600 --output=DIFFICULTY \
        --max_new_tokens=40 --many=128

Six runs, three seeds each, of about two minutes on two cores.
"""

CONFIG = "configs/rl_math_tiny.py"
METRIC = "held_out"
PLOT = {
    "x": "steps",
    "group": "control.curriculum",
    "challenger": "two_stage",
    "baseline": "moderate",
    "claim": (
        "the second stage of extremely hard tasks goes on rising where moderate ones level off"
        " (Figure 5)"
    ),
}

_LOOP = {
    "loop.steps": 40,
    "loop.eval_every": 8,
    "loop.checkpoint_every": 40,
    "loop.save_rollouts_every": 20,
}
_PLATEAU = {"control.plateau_window": 5, "control.plateau_gain": 0.05}
_POOL = {"tasks.train": ("puzzle:aiw:600",), "control.pass_many": 128}
_ARMS = {"moderate": "moderate", "two_stage": "two_stage"}
RUNS = {
    f"{name}_{seed}": (
        {"control.curriculum": value, "loop.seed": seed, "tasks.seed": seed}
        | _LOOP
        | _PLATEAU
        | _POOL
    )
    for name, value in _ARMS.items()
    for seed in range(3)
}
