"""The demo's reinforcement learning: GRPO on small puzzles, from the cold start of
configs/sft_tiny.py.

python -m experiments.rl --config=configs/rl_math_tiny.py --workdir=W/rl \
    --config.start.workdir=W/sft
"""

from ml_collections import ConfigDict

from configs import tiny


def _engine() -> ConfigDict:
    engine = ConfigDict()
    engine.context = 160  # tokens of prompt and output
    engine.num_rows = 64  # rollouts at a time
    engine.min_rows = 64  # of the smallest batch that is compiled
    engine.page_size = 16
    engine.num_pages = 640
    engine.prefill_chunk = 128
    engine.min_chunk = 32  # of the shortest prefill that is compiled
    engine.decode_steps = 8
    engine.draft_tokens = 0  # guessed by the MTP block
    engine.weights = "compute"  # or fp8 (128 x 128 blocks), int8
    engine.cache_dtype = "compute"
    engine.keep_experts = False  # True for grpo.replay_experts
    return engine


def _tasks() -> ConfigDict:
    tasks = ConfigDict()
    tasks.train = ("puzzle:aiw:2000",)  # or paths of task files
    tasks.held_out = ("puzzle:aiw:100",)
    tasks.seed = 0
    tasks.thinking = True
    tasks.wrong_answers = 0.0  # ablation
    return tasks


def _rollout() -> ConfigDict:
    rollout = ConfigDict()
    rollout.prompts_per_step = 16
    rollout.group_size = 8
    rollout.over_sampling = 1.0
    rollout.asynchronous = False
    rollout.workers = 0  # this process samples
    rollout.worker_resources = (("CPU", 1.0),)  # of a Ray actor, where there are workers
    rollout.dynamic_sampling = True
    rollout.max_waves = 1  # no second round for groups without variance
    rollout.mask_truncated = False
    return rollout


def _grpo() -> ConfigDict:
    grpo = ConfigDict()
    grpo.learning_rate = 1e-3
    grpo.warmup_updates = 5
    grpo.normalize_std = True
    grpo.clip_low = 0.2
    grpo.clip_high = 0.28
    grpo.aggregation = "token"  # or sequence
    grpo.old_logprobs = "trainer"  # or engine
    grpo.importance_cap = 2.0  # 0: no correction
    grpo.replay_experts = False
    grpo.updates_per_step = 1
    grpo.max_staleness = 0  # on policy
    grpo.mtp_weight = 0.0
    grpo.bias_rate = 0.0
    grpo.balance_weight = 1e-4
    grpo.row_length = 256
    grpo.rows = 8
    return grpo


def _control() -> ConfigDict:
    control = ConfigDict()
    control.curriculum = "none"  # or moderate, two_stage
    control.difficulty = ""  # file of experiments.difficulty
    control.pass_few = 8
    control.pass_many = 512
    control.temperatures = (1.0,)  # one: fixed
    control.temperature_loss = 0.01
    control.plateau_window = 10  # steps
    control.plateau_gain = 0.01
    control.length_stages = ((0, 40),)  # (first step, output tokens)
    return control


def _loop() -> ConfigDict:
    loop = ConfigDict()
    loop.seed = 0
    loop.steps = 60
    loop.checkpoint_every = 20
    loop.keep_checkpoints = 1
    loop.eval_every = 10
    loop.eval_samples = 4
    loop.eval_temperature = 1.0
    loop.save_rollouts_every = 10  # 0: never
    return loop


def get_config() -> ConfigDict:
    config = ConfigDict()
    base = tiny.get_config()
    config.model, config.mesh, config.optimizer = base.model, base.mesh, base.optimizer
    config.optimizer.weight_decay = 0.0
    config.engine = _engine()
    config.tasks = _tasks()
    config.rollout = _rollout()
    config.grpo = _grpo()
    config.control = _control()
    config.loop = _loop()
    config.start = ConfigDict({"workdir": "runs/demo/sft", "step": -1})
    return config
