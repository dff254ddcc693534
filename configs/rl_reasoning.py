"""Reinforcement learning of the reasoning expert, 355B (arXiv 2508.06471, section 3.2):
mathematics, code and science, verified.

    python -m experiments.difficulty --workdir=runs/experts/sft_reasoning \
        --tasks=data/tasks/math.jsonl,data/tasks/code.jsonl,data/tasks/science.jsonl \
        --max_new_tokens=65536 --output=runs/experts/difficulty.jsonl
    python -m experiments.rl --config=configs/rl_reasoning.py --workdir=runs/experts/reasoning

From the paper: GRPO without KL term, token-weighted loss, one stage at 64K output tokens, moderate
tasks and then those with pass@8 = 0 and pass@512 > 0, the temperature swept where the reward stops
rising, FP8 weights for rollouts, BF16 for training. Group size, clip, learning rate and the sizes
of a step are not printed: ours. Sized for 512 chips, not run.
"""

from ml_collections import ConfigDict

from configs import rl_math_tiny, sft_reasoning

CHIPS = 512
CONTEXT = 73_728  # tokens: an output of 64K, a prompt of 8K


def _size(config: ConfigDict):
    """For 512 chips; ours, but for what says otherwise."""
    engine = config.engine
    engine.context = CONTEXT
    engine.num_rows = engine.min_rows = 4 * CHIPS
    engine.page_size = 64
    # a chip holds one output of full length, or four of 16K: 28 GB
    engine.num_pages = CHIPS * CONTEXT // engine.page_size
    engine.prefill_chunk = 2048
    engine.min_chunk = 256
    engine.decode_steps = 16
    engine.weights = "fp8"  # the paper's: blocks of 128 x 128, quantised anew at every update

    rollout = config.rollout
    rollout.prompts_per_step = 128
    rollout.group_size = 16
    rollout.over_sampling = 1.25
    rollout.asynchronous = False
    rollout.workers = 0  # this process samples
    rollout.worker_resources = (("CPU", 1.0),)  # of a Ray actor, where there are workers
    rollout.dynamic_sampling = True  # the paper's
    rollout.max_waves = 4

    config.grpo.row_length = CONTEXT
    config.grpo.rows = CHIPS


def get_config() -> ConfigDict:
    config, base = rl_math_tiny.get_config(), sft_reasoning.get_config()
    config.model, config.mesh, config.optimizer = base.model, base.mesh, base.optimizer
    config.start.workdir = "runs/experts/sft_reasoning"
    _size(config)

    config.tasks.train = tuple(f"data/tasks/{name}.jsonl" for name in ("math", "code", "science"))
    config.tasks.held_out = tuple(
        f"data/tasks/{name}_held_out.jsonl" for name in ("math", "code", "science")
    )

    grpo = config.grpo
    grpo.learning_rate = 1e-6  # ours
    grpo.warmup_updates = 20  # ours
    grpo.normalize_std = False  # the paper's objective is r - mean r
    grpo.clip_low, grpo.clip_high = 0.2, 0.28  # clip-higher, DAPO's numbers (arXiv 2503.14476)
    grpo.aggregation = "token"  # Figure 7, left
    grpo.old_logprobs = "trainer"
    grpo.importance_cap = 2.0  # between FP8 rollouts and BF16 training; ours
    grpo.updates_per_step = 4  # ours
    grpo.max_staleness = 0  # synchronous and colocated
    grpo.bias_rate = 0.0  # as from 15T tokens of pre-training on

    control = config.control
    control.curriculum = "two_stage"  # Figure 5
    control.difficulty = "runs/experts/difficulty.jsonl"
    control.pass_few, control.pass_many = 8, 512
    control.temperatures = (1.0, 1.05, 1.1, 1.2, 1.3)  # ours
    control.temperature_loss = 0.01
    control.plateau_window = 20  # ours
    control.plateau_gain = 0.005  # ours
    control.length_stages = ((0, 65_536),)  # one stage: Figure 6

    loop = config.loop
    loop.steps = 1000  # ours
    loop.checkpoint_every = 20
    loop.keep_checkpoints = 3
    loop.eval_every = 20
    return config
