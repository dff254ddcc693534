"""GLM-4.5-Air 106B-A12B (arXiv 2508.06471, Table 1).

    python -m experiments.train --config=configs/glm45_air.py --workdir=W

105.611B parameters, 107.986B with the MTP block, 12.18B active.
"""

from ml_collections import ConfigDict

from configs import glm45


def get_config() -> ConfigDict:
    config = glm45.get_config()
    model = config.model
    model.hidden_size = 4096
    model.num_layers = 46
    model.num_dense_layers = 1
    model.dense_ffn_size = 10944
    model.expert_ffn_size = 1408
    model.qk_norm = False
    model.num_experts = 128
    model.routed_scaling_factor = 1.0
    return config
