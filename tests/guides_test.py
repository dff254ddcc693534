"""The guides: their Python runs, their commands exist, and the glossary of metrics names what the
code writes.
"""

import ast
import itertools
import os
import pathlib
import re
import subprocess
import sys

import pytest

from glm_jax.run.recorder import read_metrics
from tests import glossary

ROOT = pathlib.Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").rglob("*.md"))
GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS]
WRITERS = ("train", "rl", "optim", "run", "evaluation", "envs")  # packages that may write a metric
HAVE_EXAMPLES = {
    "add_a_config", "add_a_data_source", "add_a_kernel", "add_a_verifier", "add_an_environment",
    "profiling", "train_an_agent", "web_search",
}  # fmt: skip

name_of = lambda path: path.relative_to(ROOT).as_posix()


def examples(path):
    return re.findall(r"^```python\n(.*?)^```", path.read_text("utf-8"), re.DOTALL | re.MULTILINE)


RUNNABLE = [(path, i) for path in GUIDES for i in range(len(examples(path)))]


def test_the_guides_that_promise_an_example_have_one():
    assert {path.stem for path, _ in RUNNABLE} == HAVE_EXAMPLES
    for path in GUIDES:
        for example in examples(path):
            assert "assert" in example and 10 <= len(example.splitlines()) <= 65, name_of(path)


@pytest.mark.parametrize(("path", "number"), RUNNABLE, ids=lambda v: getattr(v, "stem", str(v)))
def test_the_example_of_a_guide_runs(path, number, tmp_path):
    script = tmp_path / "example.py"
    script.write_text(examples(path)[number])
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, script.name],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not done.stdout


def commands(text):
    """(package, module, arguments) of each command of ours; a backslash continues a line."""
    joined = re.sub(r"\\\n\s*", "", text)
    return re.findall(r"-m (experiments|pallas_kernels)\.(\w+)([^\n`|]*)", joined)


def flags_of(source):
    """Names of the flags that a command defines, by itself or as groups of flag_groups.py."""
    shared = ast.parse((ROOT / "experiments" / "flag_groups.py").read_text("utf-8")).body
    groups = {node.name: ast.unparse(node) for node in shared if isinstance(node, ast.ClassDef)}
    for group in re.findall(r"(?:flag_groups\.)?(\w+)\.define\(\)", source):
        yield from flags_of(groups[group].replace(f"{group}.define()", ""))
    yield from re.findall(r"""DEFINE_\w+\(\s*['"](\w+)['"]""", source)
    yield from re.findall(r'add_argument\(\s*"--(\w+)"', source)


def texts():
    """(name, text) of the pages, the Makefile, and the docstrings of commands and configs."""
    for path in [*PAGES, ROOT / "Makefile"]:
        yield name_of(path), path.read_text("utf-8")
    for folder in ("configs", "experiments"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield name_of(path), ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""


TEXTS = dict(texts())


@pytest.mark.parametrize("name", TEXTS)
def test_every_command_named_exists(name):
    text = TEXTS[name]
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = re.findall(r"(?:`|^ *|\$ )make ([a-z-]+)", text, re.MULTILINE)
    broken = [f"no target {t}" for t in targets if not re.search(f"^{t}:", makefile, re.MULTILINE)]
    for package, module, arguments in commands(text):
        file = ROOT / package / f"{module}.py"
        if not file.is_file():
            broken.append(f"there is no {package}.{module}")
            continue
        flags = {"help", *flags_of(file.read_text("utf-8"))}
        for flag, key in re.findall(r"(?<![\w-])--(\w+)((?:\.\w+)*)", arguments.split(" #")[0]):
            if flag not in flags and flag.removeprefix("no") not in flags:
                broken.append(f"{package}.{module} has no --{flag}")
            if key and flag != "config":
                broken.append(f"{package}.{module}: --{flag}{key}")
            if key and key.count(".") == 2 and not is_config_key(key):
                broken.append(f"no config has the key {key[1:]}")
    assert not broken, "\n".join(broken)


def is_config_key(key):
    """Whether `.section.name` is a key of some file of configs/."""
    section, name = key[1:].split(".")
    pattern = re.compile(rf"\b{section}\.{name} = ")
    return any(pattern.search(p.read_text("utf-8")) for p in (ROOT / "configs").glob("*.py"))


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_link_of_a_page_leads_somewhere(path):
    prose = re.sub(r"^```.*?^```", "", path.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[\w-]*)?\)", prose)
    broken = [t for t in targets if "://" not in t and not (path.parent / t).exists()]
    assert not broken, broken


def test_every_heading_of_the_paper_page_that_the_code_cites_exists():
    headings = set(re.findall(r"^## (.+)$", (ROOT / "docs/glm45.md").read_text("utf-8"), re.M))
    broken = []
    for top in ("glm_jax", "data", "experiments", "configs", "pallas_kernels", "tests"):
        for path in (ROOT / top).rglob("*.py"):
            if path == pathlib.Path(__file__):
                continue
            text = re.sub(r"\s*\n\s*(?:# )?", " ", path.read_text("utf-8"))
            for cited in re.findall(r'docs/glm45\.md, "([^"]+)"', text):
                if cited not in headings:
                    broken.append(f"{name_of(path)}: docs/glm45.md has no heading {cited!r}")
    assert headings and not broken, "\n".join(broken)


def test_every_metric_of_a_training_run_is_in_the_glossary(start):
    assert not glossary.unknown(read_metrics(start), "train")


def literals():
    """String literals, and the literal parts of f-strings, of the packages that write metrics."""
    found = set()
    for package in WRITERS:
        for path in (ROOT / "glm_jax" / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.add(node.value)
    return found


def test_every_metric_of_the_glossary_is_written_by_the_code():
    """Each literal part of a key is a literal of the code, or two of them joined."""
    known = literals()
    joined = {a + b for a, b in itertools.product(known, repeat=2) if len(a) + len(b) < 40}
    broken = [
        key
        for key in glossary.rows()
        if not all(part in known | joined for part in re.split(r"<\w+>", key) if part)
    ]
    assert not broken, broken
