"""A verified pool against one with three wrong answers in ten (Figure 7, right), 40 steps of GRPO.

    python -m experiments.sweep --sweep=experiments/sweeps/rl_label_noise.py --workdir=W \
        --set=start.workdir=SFT

SFT: a run of experiments.sft with configs/sft_tiny.py. Six runs, three seeds each, of about two
minutes on two cores.
"""

CONFIG = "configs/rl_math_tiny.py"
METRIC = "held_out"
PLOT = {
    "x": "steps",
    "group": "tasks.wrong_answers",
    "challenger": "0.0",
    "baseline": "0.3",
    "claim": (
        "a small pool with expert-verified answers beats a pool with wrong ones (Figure 7, right)"
    ),
}

_LOOP = {
    "loop.steps": 40,
    "loop.eval_every": 8,
    "loop.checkpoint_every": 40,
    "loop.save_rollouts_every": 20,
}
_ARMS = {"verified": 0.0, "noisy": 0.3}
RUNS = {
    f"{name}_{seed}": {"tasks.wrong_answers": value, "loop.seed": seed, "tasks.seed": seed} | _LOOP
    for name, value in _ARMS.items()
    for seed in range(3)
}
