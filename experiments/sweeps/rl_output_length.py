"""The whole output length from the start against one that grows in stages (Figure 6), 40 steps of
GRPO.

    python -m experiments.sweep --sweep=experiments/sweeps/rl_output_length.py --workdir=W \
        --set=start.workdir=SFT

SFT: a run of experiments.sft with configs/sft_tiny.py. Half of its answers show their work (28
tokens and more), half guess at once (11). Six runs, three seeds each, of about two minutes on two
cores.
"""

CONFIG = "configs/rl_math_tiny.py"
METRIC = "held_out"
PLOT = {
    "x": "steps",
    "group": "control.length_stages",
    "challenger": "((0, 40),)",
    "baseline": "((0, 16), (14, 28), (28, 40))",
    "claim": "training at the whole output length throughout beats growing it in stages (Figure 6)",
}

_LOOP = {
    "loop.steps": 40,
    "loop.eval_every": 8,
    "loop.checkpoint_every": 40,
    "loop.save_rollouts_every": 20,
}
_ARMS = {"single": ((0, 40),), "growing": ((0, 16), (14, 28), (28, 40))}
RUNS = {
    f"{name}_{seed}": (
        {"control.length_stages": value, "loop.seed": seed, "tasks.seed": seed} | _LOOP
    )
    for name, value in _ARMS.items()
    for seed in range(3)
}
