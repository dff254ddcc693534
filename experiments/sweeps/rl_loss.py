"""Token-weighted mean loss against sequence mean (Figure 7, left), 40 steps of GRPO.

    python -m experiments.sweep --sweep=experiments/sweeps/rl_loss.py --workdir=W \
        --set=start.workdir=SFT

SFT: a run of experiments.sft with configs/sft_tiny.py. Six runs, three seeds each, of about two
minutes on two cores.
"""

CONFIG = "configs/rl_math_tiny.py"
METRIC = "held_out"
PLOT = {
    "x": "steps",
    "group": "grpo.aggregation",
    "challenger": "token",
    "baseline": "sequence",
    "claim": "the token-weighted loss learns faster than the sequence mean (Figure 7, left)",
}

_LOOP = {
    "loop.steps": 40,
    "loop.eval_every": 8,
    "loop.checkpoint_every": 40,
    "loop.save_rollouts_every": 20,
}
_ARMS = {"token": "token", "sequence": "sequence"}
RUNS = {
    f"{name}_{seed}": {"grpo.aggregation": value, "loop.seed": seed, "tasks.seed": seed} | _LOOP
    for name, value in _ARMS.items()
    for seed in range(3)
}
