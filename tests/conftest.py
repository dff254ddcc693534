"""Eight simulated CPU devices for every test, a persistent compilation cache, and tiny configs."""

from __future__ import annotations

import os
import pathlib
import tempfile

os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parent.parent / ".cache" / "jax")
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest
import toy

from glm_jax.train.state import FAST_COMPILE
from pallas_kernels import compiler

jax.config.update("jax_num_cpu_devices", 8)
# Programs of tests run for milliseconds: compiling them five times faster is worth more than
# running them faster. XLA reads the variable before its first use, not when it is imported.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        *(f"--{name}={str(value).lower()}" for name, value in FAST_COMPILE.items()),
    ]
)

# has to be known to the TPU compiler before its first use in this process
SCHEDULES = tempfile.TemporaryDirectory()
compiler.dump_schedules(pathlib.Path(SCHEDULES.name))


@pytest.fixture(autouse=True, scope="module")
def _bounded_memory_maps():
    """Forgets compiled programs where they are many: each takes some memory maps, and a process
    that has 65,530 is aborted.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > 20_000:
        jax.clear_caches()


@pytest.fixture(scope="session")
def schedules() -> pathlib.Path:
    """The folder for compiler.judge."""
    return pathlib.Path(SCHEDULES.name)


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory):
    """A curated dataset of small generated Python files."""
    from configs import curate as curate_config
    from data.curation import CurateConfig, curate

    root = tmp_path_factory.mktemp("corpus")
    for i in range(60):
        lines = [
            f"def function_{i}_{j}(value):\n    return value * {j} + {i}\n\n"
            for j in range(5 + i % 7)
        ]
        (root / f"module_{i}.py").write_text("import os\n\n\n" + "".join(lines))
    config = curate_config.get_config()
    config.source, config.files_root, config.files_glob = "files", str(root), "**/*.py"
    config.vocab_size, config.held_out_fraction = 320, 0.2
    output = tmp_path_factory.mktemp("data") / "dataset"
    curate(CurateConfig(**config.to_dict()), output, progress=False)
    return output


@pytest.fixture(scope="session")
def start(corpus_folder, tmp_path_factory):
    """Work directory of a toy run of one step."""
    workdir = tmp_path_factory.mktemp("start") / "run"
    toy.pretrain(corpus_folder, workdir)
    return workdir


@pytest.fixture
def toy_config(corpus_folder):
    return toy.small_config(corpus_folder)
