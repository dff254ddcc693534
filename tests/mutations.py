"""Changes the product in one place at a time and looks whether the tests of its folder notice.

    .venv/bin/python -m tests.mutations --count=200 --seed=0 --report=runs/mutations.jsonl

The changes are cosmic-ray's. A place is drawn first and then one of its changes, so that `+`, which
has six, counts no more than a number, which has two. Left out is what cannot change behaviour or
does so too plainly: annotations, the text of logs, what does not compile, bits for arithmetic (`^`
for `+`), and identity for equality, which depends on what CPython shares.

A change is made in a copy of the tree. The tests that reach the statement come first, quick ones
before slow ones, then the rest of their files, and of the files that import the module the tests
that start a process, which may reach it there; a statement that no test reaches gets all tests of
the folder. What each test reaches is recorded once, test file by test file (.cache/mutations), and
has to pass. A test that takes three times as long as the longest of its file, and --patience, is
taken for hanging: noticed; a machine that others use needs more patience.

At the end every folder is run in the order of one of its changes with no change made, which must
pass. The report has a line for each change and resumes: what stands in it is not run again. Needs
Python 3.12, and hours: a change that is noticed takes seconds to a minute, one that survives all
that reaches it, which is minutes in train and rl.
"""

from __future__ import annotations

import ast
import collections
import compileall
import concurrent.futures
import contextlib
import dataclasses
import difflib
import hashlib
import json
import os
import pathlib
import queue
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator

from absl import app, flags
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.provider import OperatorProvider

ROOT = pathlib.Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "mutations"
# of the product -> the tests
FOLDERS = {"losses": "tests/losses_test.py"} | {
    name: f"tests/{name}"
    for name in ("optim", "train", "sft", "rl", "rollouts", "rewards", "evaluation")
}
MEMORY_BYTES = 14 << 30  # of one process
SLOW_SECONDS = 10  # such tests come last
OPERATORS = OperatorProvider()
NO_CHANGE = "NoOp"
BITS = {"RShift", "LShift", "BitOr", "BitAnd", "BitXor"}
IDENTITY = [{"Eq", "Is"}, {"NotEq", "IsNot"}]

COUNT = flags.DEFINE_integer("count", 200, "Changes to draw.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Of the draw.")
PATIENCE = flags.DEFINE_float("patience", 180, "Seconds more than a test may take.", 1)
REPORT = flags.DEFINE_string("report", "runs/mutations.jsonl", "One line for each change.")
FOLDER = flags.DEFINE_multi_enum("folder", list(FOLDERS), list(FOLDERS), "Of the product.")
JOBS = flags.DEFINE_integer("jobs", 1, "Changes that are judged at a time.", lower_bound=1)


# --- changes ---


@dataclasses.dataclass(frozen=True)
class Mutation:
    """before, after: the lines that differ, without their margins."""

    file: str
    line: int
    operator: str
    occurrence: int
    before: str = ""
    after: str = ""

    @property
    def folder(self) -> str:
        return pathlib.PurePath(self.file).with_suffix("").parts[1]

    def source(self) -> str:
        text = (ROOT / self.file).read_text("utf-8")
        return mutate_code(text, OPERATORS[self.operator](), self.occurrence)


def product_files(folder: str) -> list[str]:
    found = [ROOT / "glm_jax" / f"{folder}.py", *sorted((ROOT / "glm_jax" / folder).rglob("*.py"))]
    return [path.relative_to(ROOT).as_posix() for path in found if path.is_file()]


def places(file: str) -> dict[tuple, list[tuple[str, int]]]:
    """(line, column, kind of operator) -> operators and which occurrence of theirs it is."""
    nodes = list(ast_nodes(get_ast((ROOT / file).read_text("utf-8"))))
    found = collections.defaultdict(list)
    for name in OPERATORS:
        kind, *swapped = name.split("_")
        if (
            OPERATORS[name].arguments()  # wants names of variables
            or (kind == "ReplaceBinaryOperator" and len(BITS & set(swapped)) == 1)
            or set(swapped) in IDENTITY
        ):
            continue
        operator = OPERATORS[name]()
        positions = ((n, start) for n in nodes for start, _ in operator.mutation_positions(n))
        for occurrence, (node, start) in enumerate(positions):
            if node.parent is None or node.parent.type != "parameters":  # `*` between them
                found[*start, kind].append((name, occurrence))
    return found


def draw(files: Iterable[str], count: int, seed: int) -> list[Mutation]:
    """An edit of the product changes the draw of the lines that it touches, not of the others."""
    drawn = []
    for file in files:
        lines = (ROOT / file).read_text("utf-8").splitlines()
        for (line, column, kind), changes in places(file).items():
            text = lines[line - 1]
            rng = random.Random(f"{seed} {file} {text} {lines[:line].count(text)} {column} {kind}")
            drawn.append((rng.random(), file, line, rng.sample(changes, len(changes))))
    found = []
    for _, file, line, changes in sorted(drawn):
        if len(found) == count:
            break
        original = (ROOT / file).read_text("utf-8")
        for name, occurrence in changes:
            change = Mutation(file, line, name, occurrence)
            if meaning(change.source()) not in (None, meaning(original)):
                before, after = difference(original, change.source())
                found.append(dataclasses.replace(change, before=before, after=after))
                break
    return found


def difference(one: str, other: str) -> tuple[str, str]:
    lines = list(difflib.ndiff(one.splitlines(), other.splitlines()))
    return tuple(" ".join(line[2:].strip() for line in lines if line[0] == sign) for sign in "-+")


def meaning(source: str) -> str | None:
    """Equal for programs that behave alike; None for what does not compile."""
    with warnings.catch_warnings(action="ignore"):  # `is` with a literal
        try:
            compile(source, "", "exec")
            return ast.dump(_Bare().visit(ast.parse(source)))
        except SyntaxError:
            return None


class _Bare(ast.NodeTransformer):
    """Takes away annotations and logging."""

    def visit_FunctionDef(self, node):
        node.returns = None
        return self.generic_visit(node)

    def visit_arg(self, node):
        node.annotation = None
        return node

    def visit_AnnAssign(self, node):
        node.annotation = ast.Constant(None)
        return self.generic_visit(node)

    def visit_Expr(self, node):
        text = ast.unparse(node)
        return ast.Pass() if re.match(r"logg(er|ing)\.", text) else self.generic_visit(node)


def statement_lines(source: str, line: int) -> set[int]:
    """Lines of the statement at a line without those of the statements in it; of a function's or
    class's first lines, all of it.
    """

    def span(node) -> range:
        decorators = [d.lineno for d in getattr(node, "decorator_list", ())]
        return range(min([node.lineno, *decorators]), node.end_lineno + 1)

    statements = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.stmt)]
    innermost = min((n for n in statements if line in span(n)), key=lambda n: len(span(n)))
    lines = set(span(innermost))
    if not isinstance(innermost, ast.FunctionDef | ast.ClassDef):
        lines -= {
            inner
            for node in ast.walk(innermost)
            if isinstance(node, ast.stmt) and node is not innermost
            for inner in span(node)
        }
    return lines


# --- tests ---


class Copy:
    """A copy of the tree and the tests that run in it."""

    def __init__(self, folder: pathlib.Path):
        self.tree, self.folder = folder / "tree", folder
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"],
            cwd=ROOT, check=True, capture_output=True, text=True,
        )  # fmt: skip
        for name in listed.stdout.splitlines():
            if (ROOT / name).is_file():
                (self.tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.tree / name)
        compileall.compile_dir(self.tree, quiet=1)

    def run(
        self, files: Iterable[str], seconds: float, **variables: pathlib.Path
    ) -> tuple[int | None, str]:
        """pytest's exit status, None where it had to be killed, and what it printed."""
        environment = os.environ | {name: str(path) for name, path in variables.items()} | {
            "JAX_COMPILATION_CACHE_DIR": str(CACHE / "jax"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            # Two changes in one second are one for the cache of compiled files.
            "PYTHONDONTWRITEBYTECODE": "1",
        }  # fmt: skip
        command = [
            sys.executable, "-m", "pytest", "-x", "-q", "--tb=short", "-p", "tests.reached",
            f"--basetemp={self.folder / 'temporary'}", *files,
        ]  # fmt: skip
        output = self.folder / "output"
        with output.open("wb") as file:
            process = subprocess.Popen(
                command, cwd=self.tree, env=environment, stdin=subprocess.DEVNULL, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            resource.prlimit(process.pid, resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
            try:
                status = process.wait(seconds)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return status, output.read_text("utf-8", errors="replace")

    def record(self, test_file: str) -> dict:
        """What tests/reached.py says of a test file of the unchanged tree."""
        path = CACHE / f"{test_file.replace('/', '-')}-{_digest(test_file)}.json"
        if not path.exists():
            CACHE.mkdir(parents=True, exist_ok=True)
            written = self.folder / "record"
            status, output = self.run([test_file], 3600, REACHED_RECORD=written)
            if status:
                raise RuntimeError(f"{test_file} fails on the unchanged tree\n{output}")
            shutil.move(written, path)
        return json.loads(path.read_text("utf-8"))

    def judge(self, mutation: Mutation, limits: dict[str, float]) -> tuple[str, str]:
        """("noticed", "hangs" or "survives", the test that noticed)."""
        path, order, started = self.tree / mutation.file, self.folder / "order", self.folder / "on"
        order.write_text(json.dumps(limits), "utf-8")
        started.write_text("", "utf-8")
        path.write_text(mutation.source(), "utf-8")
        try:
            status, output = self.run(
                dict.fromkeys(test.split("::")[0] for test in limits), sum(limits.values()) + 120,
                REACHED_ORDER=order, REACHED_STARTED=started,
            )  # fmt: skip
        finally:
            shutil.copy2(ROOT / mutation.file, path)
        if status == 0:
            return "survives", ""
        test = (["import", *started.read_text("utf-8").splitlines()])[-1]
        hangs = status is None or "Timeout (" in output
        return "hangs" if hangs else "noticed", test


def _digest(test_file: str) -> str:
    """Of all that the run of a test file depends on, other test files aside."""
    digest = hashlib.sha256()
    paths = (p for top in ("glm_jax", "pallas_kernels", "data", "configs", "experiments", "tests")
             for p in sorted((ROOT / top).rglob("*.py")))  # fmt: skip
    for path in paths:
        name = path.relative_to(ROOT).as_posix()
        if name == test_file or not name.endswith(("_test.py", "mutations.py")):
            digest.update(name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def limits_in_order(mutation: Mutation, recorded: dict[str, dict], everything: bool) -> dict:
    """Test -> seconds that it may take, in the order to run. recorded: of each test file of the
    folder; everything: also tests that cannot reach the change.
    """
    lines = statement_lines((ROOT / mutation.file).read_text("utf-8"), mutation.line)
    reaches = {
        test: bool(lines & set(found["lines"].get(mutation.file, ())))
        for tests in recorded.values()
        for test, found in tests.items()
        if test
    }
    in_files = {
        file
        for file, tests in recorded.items()
        if any(lines & set(found["lines"].get(mutation.file, ())) for found in tests.values())
    }
    near = {  # their processes may reach the change
        file
        for file, tests in recorded.items()
        if any(mutation.file in found["lines"] for found in tests.values())
    }
    everything = everything or not in_files
    module = mutation.file.removesuffix(".py").replace("/", ".")
    ranks = {}
    for file, tests in recorded.items():
        longest = max(found["seconds"] for found in tests.values())
        whole = sum(found["seconds"] for found in tests.values())
        names = not _imports(file, module)
        for test, found in tests.items():
            may_reach = file in in_files or (file in near and found["process"])
            if not test or not (everything or may_reach):
                continue
            in_module = mutation.file in found["lines"]
            rank = 0 if reaches[test] else 1 if in_module else 2
            slow = found["seconds"] > SLOW_SECONDS
            away = not reaches[test] and names  # from where the change is
            ranks[test] = (
                (away, slow, rank, names, whole, file, found["seconds"]),
                3 * longest + PATIENCE.value,
            )
    return {test: limit for test, (_, limit) in sorted(ranks.items(), key=lambda r: r[1][0])}


def _imports(test_file: str, module: str) -> bool:
    for node in ast.walk(ast.parse((ROOT / test_file).read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            if module in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names)):
                return True
        elif isinstance(node, ast.Import) and module in {alias.name for alias in node.names}:
            return True
    return False


# --- the report ---


def judged(mutations: list[Mutation], known: list[dict]) -> Iterator[dict]:
    """Lines of the report, first those that are known."""
    done = {(k["file"], k["operator"], k["occurrence"], k["before"]): k for k in known}
    controls = {m.folder: dataclasses.replace(m, operator=NO_CHANGE) for m in mutations}
    left = []
    for mutation in [*mutations, *controls.values()]:
        key = (mutation.file, mutation.operator, mutation.occurrence, mutation.before)
        if key in done:
            yield done[key]
        else:
            left.append(mutation)
    with (
        tempfile.TemporaryDirectory() as folder,
        concurrent.futures.ThreadPoolExecutor(JOBS.value) as pool,
    ):
        copies: queue.SimpleQueue[Copy] = queue.SimpleQueue()  # those that are not in use
        for job in range(JOBS.value):
            copies.put(Copy(pathlib.Path(folder) / str(job)))

        @contextlib.contextmanager
        def free_copy():
            copy = copies.get()
            try:
                yield copy
            finally:
                copies.put(copy)

        def record(file: str) -> dict:
            with free_copy() as copy:
                return copy.record(file)

        def judge(mutation: Mutation) -> dict:
            everything = mutation.operator == NO_CHANGE
            limits = limits_in_order(mutation, recorded[mutation.folder], everything)
            with free_copy() as copy:
                started = time.perf_counter()
                outcome, test = copy.judge(mutation, limits)
                seconds = round(time.perf_counter() - started, 1)
            return dataclasses.asdict(mutation) | {
                "outcome": outcome, "by": test, "tests": len(limits), "seconds": seconds,
            }  # fmt: skip

        files = {name: tests_of(name) for name in dict.fromkeys(m.folder for m in left)}
        found = pool.map(record, [file for names in files.values() for file in names])
        recorded = {name: {file: next(found) for file in names} for name, names in files.items()}
        print(f"{sum(len(r) for f in recorded.values() for r in f.values())} tests recorded")
        for line in concurrent.futures.as_completed([pool.submit(judge, m) for m in left]):
            yield line.result()


def tests_of(folder: str) -> list[str]:
    path = ROOT / FOLDERS[folder]
    files = [path] if path.is_file() else sorted(path.rglob("*_test.py"))
    return [file.relative_to(ROOT).as_posix() for file in files]


def show(lines: list[dict]):
    print("\n| folder | changes | noticed | survive | seconds |\n|---|---|---|---|---|")
    rows = collections.defaultdict(list)
    for line in lines:
        rows[pathlib.PurePath(line["file"]).with_suffix("").parts[1]].append(line)
    for folder, found in [*sorted(rows.items()), ("all", lines)]:
        survive = sum(line["outcome"] == "survives" for line in found)
        seconds = sum(line["seconds"] for line in found)
        print(f"| {folder} | {len(found)} | {len(found) - survive} | {survive} | {seconds:.0f} |")
    print(f"noticed: {1 - survive / len(lines):.1%}\n")
    for line in lines:
        if line["outcome"] == "survives":
            print(f"{line['file']}:{line['line']} {line['operator']}")
            print(f"    - {line['before']}\n    + {line['after']}")


def main(argv: list[str]):
    del argv
    if sys.version_info < (3, 12):
        raise RuntimeError(f"Python {sys.version.split()[0]} has no sys.monitoring; 3.12 has")
    files = [file for folder in dict.fromkeys(FOLDER.value) for file in product_files(folder)]
    mutations = draw(files, COUNT.value, SEED.value)
    report = pathlib.Path(REPORT.value)
    report.parent.mkdir(parents=True, exist_ok=True)
    known = [json.loads(line) for line in report.open(encoding="utf-8")] if report.exists() else []
    lines, controls = [], []
    for line in judged(mutations, known):
        (controls if line["operator"] == NO_CHANGE else lines).append(line)
        if line not in known:
            with report.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        print(
            f"{len(lines)}/{len(mutations)} {line['outcome']:8} {line['seconds']:6.1f} s "
            f" {line['file']}:{line['line']} {line['operator']} {line['by']}",
            flush=True,
        )
    show(lines)
    failed = [line for line in controls if line["outcome"] != "survives"]
    for line in failed:
        print(f"with no change {line['by']} fails in the order of {line['file']}:{line['line']}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    app.run(main)
