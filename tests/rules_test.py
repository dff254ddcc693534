"""The rules of the design, held on this tree: arrows, sizes, names, configs, requirements, and what
the README promises.
"""

import ast
import dataclasses
import functools
import graphlib
import importlib
import pathlib
import re
import subprocess
import sys

import config_reads
import pytest

ROOT = pathlib.Path(__file__).parent.parent
TOP = ("configs", "pallas_kernels", "data", "glm_jax", "experiments", "tests")
PRODUCT = ("configs", "pallas_kernels", "data", "glm_jax", "experiments")

# Left may import right, and itself. The longest matching name counts. Nobody imports experiments or
# tests.
ARROWS = {
    "configs": (),
    "pallas_kernels": (),
    "data": (),
    "glm_jax.config": (),
    "glm_jax.torus": (),
    "glm_jax.sharding": ("glm_jax.config", "glm_jax.torus"),
    "glm_jax.resharding": (),
    "glm_jax.devices": (),
    "glm_jax.files": (),
    "glm_jax.model": ("glm_jax.config", "glm_jax.sharding", "pallas_kernels"),
    "glm_jax.losses": ("glm_jax.config", "glm_jax.sharding", "pallas_kernels"),
    "glm_jax.optim": ("glm_jax.config", "glm_jax.sharding", "pallas_kernels"),
    "glm_jax.hf": ("glm_jax.config", "glm_jax.model"),
    "glm_jax.rollouts": ("data",),
    "glm_jax.bubblewrap": (),
    "glm_jax.sandbox": ("glm_jax.bubblewrap",),
    "glm_jax.sandbox_guest": (),
    "glm_jax.rewards": (
        "data", "glm_jax.sandbox", "glm_jax.sandbox_guest", "glm_jax.rollouts",
    ),
    "glm_jax.infer": (
        "data", "glm_jax.config", "glm_jax.sharding", "glm_jax.resharding", "glm_jax.model",
    ),
    "glm_jax.serve": ("data", "glm_jax.infer"),
    "glm_jax.envs": (
        "data", "glm_jax.sandbox", "glm_jax.sandbox_guest", "glm_jax.rollouts", "glm_jax.rewards",
        "glm_jax.infer",  # the worker runs episodes on an engine
        "glm_jax.serve",  # and answers the calls of agents that others wrote
        "glm_jax.files",  # the corpus of web search is written there
    ),
    "glm_jax.run": ("data", "glm_jax.files"),
    "glm_jax.train": (
        "data", "glm_jax.config", "glm_jax.sharding", "glm_jax.model", "glm_jax.losses",
        "glm_jax.files", "glm_jax.optim", "glm_jax.run",
        "glm_jax.infer.engine", "glm_jax.infer.sampling",  # samples during training
    ),
    "glm_jax.evaluation": (
        "data", "glm_jax.config", "glm_jax.sharding", "glm_jax.model", "glm_jax.losses",
        "glm_jax.infer", "glm_jax.envs", "glm_jax.rollouts", "glm_jax.rewards", "glm_jax.run",
        "glm_jax.train", "glm_jax.loading", "glm_jax.files",
    ),
    "glm_jax.sft": (
        "data", "glm_jax.files", "glm_jax.config", "glm_jax.train", "glm_jax.rollouts",
        "glm_jax.envs", "glm_jax.evaluation",  # distillation samples with a finished run
    ),
    "glm_jax.rl": (
        "data", "glm_jax.config", "glm_jax.sharding", "glm_jax.model", "glm_jax.losses",
        "glm_jax.optim", "glm_jax.infer", "glm_jax.envs", "glm_jax.rollouts", "glm_jax.rewards",
        "glm_jax.run", "glm_jax.train", "glm_jax.files",
    ),
    "glm_jax.plan": (
        "glm_jax.config", "glm_jax.torus", "glm_jax.sharding", "glm_jax.model", "glm_jax.optim",
        "glm_jax.infer", "glm_jax.train", "pallas_kernels",
    ),
    "glm_jax.loading": ("data", "glm_jax.devices", "glm_jax.hf", "glm_jax.train"),
    "glm_jax": ("glm_jax.loading",),
    "experiments": ("configs", "data", "glm_jax", "pallas_kernels"),
}  # fmt: skip

MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_ENTRY_LINES = 500, 80, 142  # entries: flags aside
MAX_TEST_LINES = 600  # tables of cases are long
HEAVY = {
    "torch",
    "transformers",
    "tensorflow",
    "tensorflow_text",
    "seqio",
    "tensorflow_datasets",
    "t5",
}
HEAVY_ALLOWED = {"experiments/benchmark_sides.py"}  # the other side of the comparison
# May import what only requirements-dev.txt has.
DEV_ALLOWED = {
    "experiments/benchmark_sides.py", "glm_jax/evaluation/human_eval.py",
    "experiments/measure_sandbox.py", "glm_jax/evaluation/lm_eval.py",
    "glm_jax/bubblewrap.py", "glm_jax/envs/software/test_guest.py",
}  # fmt: skip
# What the modules of one stage alone need, in a requirements file of their own.
STAGES = {
    "glm_jax/rl/ray_source.py": "requirements-ray.txt",
    "glm_jax/envs/search/engine.py": "requirements-search.txt",
}
# Libraries that raise bare Exception, what runs untrusted code in the sandbox, environments, and a
# thread that hands its error on.
BROAD_EXCEPT_ALLOWED = {
    "data/tokenizer.py",
    "glm_jax/envs/worker.py",
    "glm_jax/rl/source.py",
    "glm_jax/run/checkpoints.py",
    "glm_jax/rewards/code_guest.py",
    "glm_jax/rewards/code_tester.py",
}
DISTRIBUTION_OF = {"absl": "absl-py", "orbax": "orbax-checkpoint"}


# --- the tree ---


def source_files(folders):
    return [
        p
        for folder in folders
        for p in sorted((ROOT / folder).rglob("*.py"))
        if "__pycache__" not in p.parts
    ]


def name_of(path):
    return path.relative_to(ROOT).as_posix()


@functools.cache
def tree_of(path):
    return ast.parse(path.read_text("utf-8"), filename=str(path))


def module_of(path):
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(dotted):
    path = ROOT / pathlib.Path(*dotted.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def imports_of(path):
    """(line, dotted name) of everything imported at any depth of the file; `from a import b` is a.b
    where that is a module.
    """
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, (
                f"{name_of(path)}:{node.lineno}: relative import; write the whole name"
            )
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield (
                    node.lineno,
                    full if node.module.split(".")[0] in TOP and is_module(full) else node.module,
                )


def group_of(dotted):
    """The group of ARROWS that a module belongs to; None for one that stands in no group."""
    if dotted == "glm_jax":
        return dotted
    parts = dotted.split(".")
    names = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((n for n in names if n in ARROWS and n != "glm_jax"), None)


def fail_on(broken):
    assert not broken, "\n" + "\n".join(broken)


# --- arrows ---


def test_the_arrows_themselves_go_round_in_no_circle():
    graph = {
        left: {group_of(r) for r in rights}
        for left, rights in ARROWS.items()
        if left != "experiments"
    }
    tuple(graphlib.TopologicalSorter(graph).static_order())


def test_every_module_has_its_place():
    fail_on([name_of(p) for p in source_files(PRODUCT) if group_of(module_of(p)) is None])


def test_imports_follow_the_arrows():
    broken = []
    for path in source_files(PRODUCT):
        group = group_of(module_of(path))
        for line, imported in imports_of(path):
            if imported.split(".")[0] not in TOP:
                continue
            inside = group_of(imported) == group
            allowed = any(
                imported == right or imported.startswith(right + ".") for right in ARROWS[group]
            )
            if not (inside or allowed):
                broken.append(f"{name_of(path)}:{line}: {group} must not import {imported}")
    fail_on(broken)


def test_only_experiments_and_configs_know_flags_and_configdicts():
    broken = []
    for path in source_files(("pallas_kernels", "data", "glm_jax")):
        for line, imported in imports_of(path):
            if imported.split(".")[0] in ("ml_collections", "absl"):
                broken.append(f"{name_of(path)}:{line}: imports {imported}")
    for path in source_files(("configs",)):
        broken += [
            f"{name_of(path)}:{line}: imports {name}"
            for line, name in imports_of(path)
            if name.split(".")[0] == "absl"
        ]
    fail_on(broken)


def test_only_sharding_makes_partition_specs():
    """All else says what a dimension is, and by_device how it is split: in pallas_kernels no rules
    are known.
    """
    broken = []
    for path in source_files(("configs", "data", "glm_jax", "experiments")):
        if name_of(path) == "glm_jax/sharding.py":
            continue
        for node in ast.walk(tree_of(path)):
            names = {getattr(node, "id", None), getattr(node, "attr", None)}
            if isinstance(node, ast.ImportFrom | ast.Import):
                names |= {alias.name.split(".")[-1] for alias in node.names}
            found = names & {"PartitionSpec", "P", "shard_map", "BATCH_AXES"}
            broken += [f"{name_of(path)}:{node.lineno}: {name}" for name in found]
    fail_on(broken)


def test_tensorflow_and_torch_stay_out():
    broken = []
    for path in source_files(PRODUCT):
        if name_of(path) not in HEAVY_ALLOWED:
            broken += [
                f"{name_of(path)}:{line}: imports {n}"
                for line, n in imports_of(path)
                if n.split(".")[0] in HEAVY
            ]
    fail_on(broken)


# --- sizes and names ---


def test_no_file_is_too_long():
    broken = []
    for path in source_files(TOP):
        lines = len(path.read_text("utf-8").splitlines())
        entry = (
            path.parent == ROOT / "experiments"
            and 'if __name__ == "__main__"' in path.read_text("utf-8")
        )
        if entry:
            lines -= lines_of_flags(tree_of(path))
        limit = MAX_ENTRY_LINES if entry else MAX_FILE_LINES
        if path.is_relative_to(ROOT / "tests"):
            limit = MAX_TEST_LINES
        if lines > limit:
            broken.append(f"{name_of(path)}: {lines} lines, at most {limit}")
    fail_on(broken)


def lines_of_flags(tree) -> int:
    """Lines of a module that define absl flags."""
    return sum(
        node.end_lineno - node.lineno + 1
        for node in tree.body
        if isinstance(node, ast.Assign) and ".DEFINE_" in ast.unparse(node.value)
    )


def test_no_function_is_too_long():
    broken = []
    for path in source_files(TOP):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    broken.append(
                        f"{name_of(path)}:{node.lineno}: {node.name} has {lines} lines, at most"
                        f" {MAX_FUNCTION_LINES}"
                    )
    fail_on(broken)


def test_file_names_say_something():
    broken = []
    for path in source_files(TOP):
        words = path.relative_to(ROOT).with_suffix("").parts
        if any(
            re.search(r"(^|_)(utils?|common|helpers?|misc|v\d+|new|old)$", word) for word in words
        ):
            broken.append(name_of(path))
    fail_on(broken)


def test_no_broad_except():
    broken = []
    for path in source_files(PRODUCT):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ExceptHandler) and name_of(path) not in BROAD_EXCEPT_ALLOWED:
                caught = (
                    {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)}
                    if node.type
                    else {"BaseException"}
                )
                if caught & {"Exception", "BaseException"}:
                    broken.append(f"{name_of(path)}:{node.lineno}: broad except")
    fail_on(broken)


def test_no_workplace_in_a_file():
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    place = re.compile(r"(?<![\w.:/])/(home|Users|root|work|farm)/\w|/tmp/\w+/|(?<!\w)\.\./shared/")
    broken = []
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.is_file() and path.suffix in {
            ".py",
            ".md",
            ".toml",
            ".txt",
            ".ipynb",
            ".json",
            ".csv",
            ".cfg",
            ".yaml",
            "",
        }:
            for number, line in enumerate(
                path.read_text("utf-8", errors="replace").splitlines(), 1
            ):
                if place.search(line) and path != pathlib.Path(__file__):
                    broken.append(f"{name}:{number}: {place.search(line).group()}")
    fail_on(broken)


# --- configs ---


def config_classes():
    """Every class that a section of some config becomes, and the names of its sections."""
    from data.curation import CurateConfig
    from experiments.entry import PRETRAINING, RL, SFT

    sections = [*PRETRAINING.items(), *SFT.items(), *RL.items(), ("curate", CurateConfig)]
    return {cls: {name for name, other in sections if other is cls} for _, cls in sections}


@pytest.mark.parametrize(
    "path",
    sorted(p for p in (ROOT / "configs").glob("*.py") if p.name != "__init__.py"),
    ids=lambda p: p.stem,
)
def test_every_key_of_a_config_is_a_field(path):
    from experiments import entry

    module = importlib.import_module(f"configs.{path.stem}")
    config = module.get_config()
    assert module.__doc__ and "python -m experiments." in module.__doc__, (
        "its docstring gives the command"
    )
    if "grpo" in config:
        assert isinstance(entry.rl_config(config)[0], entry.RlConfig)
    elif "thinking_share" in config.get("data", {}):
        assert isinstance(entry.sft_config(config), entry.RunConfig)
    elif "model" in config:
        assert isinstance(entry.run_config(config), entry.RunConfig)
    else:
        from data.curation import CurateConfig

        assert CurateConfig(**config.to_dict())


def test_configs_have_no_defaults():
    broken = []
    for cls in config_classes():
        for field in dataclasses.fields(cls):
            if not (
                field.default is dataclasses.MISSING
                and field.default_factory is dataclasses.MISSING
            ):
                broken.append(f"{cls.__name__}.{field.name} has a default")
    for path in source_files(PRODUCT):
        for node in ast.walk(tree_of(path)):
            if not isinstance(node, ast.Call):
                continue
            method = node.func.attr if isinstance(node.func, ast.Attribute) else None
            receiver = (
                ast.unparse(node.func.value if method else node.args[0])
                if method or node.args
                else ""
            )
            function = node.func.id if isinstance(node.func, ast.Name) else None
            of_config = receiver.split(".")[-1].strip("_").lower().endswith(("config", "cfg"))
            if of_config and (
                (method == "get" and len(node.args) > 1)
                or (function == "getattr" and len(node.args) > 2)
            ):
                broken.append(f"{name_of(path)}:{node.lineno}: hidden default, {ast.unparse(node)}")
    fail_on(broken)


def test_every_config_key_is_read():
    """Of its own class: `seed` of one section says nothing about `seed` of another."""
    reads = config_reads.fields_read(map(tree_of, source_files(("glm_jax", "data"))))
    broken = []
    for cls, sections in config_classes().items():
        if "mesh" in sections:
            continue  # read as getattr(config, axis) for axis in MESH_AXES
        broken += [
            f"{cls.__name__}.{field.name} is read nowhere"
            for field in dataclasses.fields(cls)
            if (cls.__name__, field.name) not in reads
        ]
    fail_on(broken)


PROGRAM = """
class AConfig:
    seed: int
    rate: float
    def __post_init__(self):
        self.rate
    @property
    def twice(self):
        return 2 * self.half
class BConfig:
    seed: int
    rate: float
class Both:
    a: AConfig
    b: BConfig | None
class Holder:
    def __init__(self, config, other: AConfig):
        self.config, self.other = config, other
    def run(self):
        READ
def make(both: Both):
    return Holder(both.b, other=both.a)
"""


@pytest.mark.parametrize(
    ("read", "found"),
    [
        ("pass", set()),
        ("self.config.seed", {("BConfig", "seed")}),
        ("self.other.seed", {("AConfig", "seed")}),
        ("c = self.other; lambda: c.rate", {("AConfig", "rate")}),
        ("self.other.seed = 1", set()),
        ("elsewhere.seed", set()),
    ],
)
def test_a_read_counts_for_the_class_that_it_is_of(read, found):
    """Of parameters with an annotation and, where there is none, with what they were given."""
    reads = config_reads.fields_read([ast.parse(PROGRAM.replace("READ", read))])
    own = {("AConfig", "half"), ("Both", "a"), ("Both", "b")}
    attributes = {("Holder", name) for name in ("config", "other")}
    assert reads - own - attributes == found
    assert own <= reads


def test_mesh_config_has_the_mesh_axes():
    from glm_jax.sharding import MESH_AXES, MeshConfig

    assert tuple(f.name for f in dataclasses.fields(MeshConfig)) == MESH_AXES


# --- requirements ---


def requirements(name):
    """Distribution -> reason."""
    found = {}
    for line in (ROOT / name).read_text("utf-8").splitlines():
        line, _, reason = line.partition("#")  # noqa: PLW2901
        if line.strip() and not line.startswith("-r"):
            found[re.match(r"[\w.-]+", line.strip()).group().lower()] = reason.strip()
    return found


@pytest.mark.parametrize("name", sorted(p.name for p in ROOT.glob("requirements*.txt")))
def test_every_requirement_has_its_reason(name):
    fail_on(
        [
            f"{name}: {distribution} has no reason"
            for distribution, reason in requirements(name).items()
            if not reason
        ]
    )


def test_requirements_are_what_is_imported():
    direct = requirements("requirements.txt")
    dev = requirements("requirements-dev.txt")
    used = set()
    broken = []
    for path in source_files(PRODUCT):
        for line, imported in imports_of(path):
            package = imported.split(".")[0]
            if package in TOP or package in sys.stdlib_module_names:
                continue
            distribution = DISTRIBUTION_OF.get(package, package.replace("_", "-")).lower()
            used.add(distribution)
            stage = requirements(STAGES[name_of(path)]) if name_of(path) in STAGES else {}
            allowed = direct | stage | (dev if name_of(path) in DEV_ALLOWED else {})
            if distribution not in allowed:
                broken.append(f"{name_of(path)}:{line}: {distribution} is not in requirements.txt")
    broken += [
        f"requirements.txt: nothing imports {distribution}" for distribution in direct.keys() - used
    ]
    fail_on(broken)


# --- what the README and the docstrings promise ---


PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_path_that_a_page_names_exists(page):
    text = page.read_text("utf-8")
    named = set()
    for quoted in re.findall(r"`([^`\n]+)`", text) + re.findall(
        r"```.*?\n(.*?)```", text, re.DOTALL
    ):
        named |= set(
            re.findall(
                r"(?<![\w./=-])((?:[\w.-]+/)+[\w.*-]*|"
                r"[\w-]+\.(?:py|md|txt|toml|ipynb|png|csv))(?![\w/])",
                quoted,
            )
        )
    tops = {p.name for p in ROOT.iterdir()} - {"runs"}
    broken = []
    for path in sorted(named):
        ours = path.split("/")[0] in tops
        if "://" in path or not ours or re.search(r"\b(W|DIR|NAME|runs)\b", path):
            continue
        if not any(ROOT.glob(path.rstrip("/"))) and not any(ROOT.glob(f"*/{path.rstrip('/')}")):
            broken.append(f"{name_of(page)}: {path} does not exist")
    fail_on(broken)
