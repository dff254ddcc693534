"""configs/rl_calculator_tiny.py with asynchronous sampling: the engine goes on with its episodes
while the learner trains, and what a step trains on is at most two updates old.

python -m experiments.rl --config=configs/rl_agent_tiny.py --workdir=W/rl \
    --config.start.workdir=W/sft

With --config.rollout.workers=2 two Ray actors sample (requirements-ray.txt).
"""

from ml_collections import ConfigDict

from configs import rl_calculator_tiny


def get_config() -> ConfigDict:
    config = rl_calculator_tiny.get_config()
    config.rollout.asynchronous = True
    config.grpo.max_staleness = 2
    return config
