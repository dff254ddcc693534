"""The demo's model learns to call a tool: GRPO on episodes of up to three turns with a calculator
(glm_jax/envs/calculator.py), from the cold start of configs/sft_calculator_tiny.py.

python -m experiments.rl --config=configs/rl_calculator_tiny.py --workdir=W/rl \
    --config.start.workdir=W/sft
"""

from ml_collections import ConfigDict

from configs import rl_math_tiny


def get_config() -> ConfigDict:
    config = rl_math_tiny.get_config()
    config.start.workdir = "runs/demo/calculator/sft"

    config.tasks.train = ("runs/demo/calculator/train.jsonl",)
    config.tasks.held_out = ("runs/demo/calculator/held_out.jsonl",)
    config.tasks.thinking = False

    # An episode: 200 tokens of tools and question, 47 sampled ones, 24 around the tool's answers.
    config.control.length_stages = ((0, 64),)
    config.engine.context = 288
    config.engine.num_pages = 1216
    config.grpo.row_length = 288

    config.loop.steps = 40
    config.loop.eval_samples = 2
    return config
