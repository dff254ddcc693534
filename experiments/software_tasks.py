"""Makes tasks of the environment `software`: bugs in real Python packages, found by their tests.

    python -m experiments.software_tasks --folder=runs/software --output=runs/software/tasks.jsonl

Downloads the source distributions of --packages with pip, which runs their build scripts as
`pip install` does; runs each package's tests in a sandbox, and again with one small change of its
source after the other. A change that makes some tests fail is a task. Goes on where it was stopped,
and prints how many tasks each package has given. What glm_jax/envs/software/judge.py says of a
fix is then true of each: with --check the expert must earn 1 and an agent who does nothing 0.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from absl import flags
from tqdm import tqdm

from experiments import entry
from glm_jax import sandbox
from glm_jax.envs import registry
from glm_jax.envs.software import environment, repository, tasks
from glm_jax.files import write_json_lines
from glm_jax.rollouts.task import read_tasks

FOLDER = flags.DEFINE_string(
    "folder", None, "The folder of distributions, records and attempts; tasks name it."
)
OUTPUT = flags.DEFINE_string("output", None, "The JSONL file of tasks to write.")
PACKAGES = flags.DEFINE_string(
    "packages",
    str(pathlib.Path(__file__).with_suffix(".txt")),
    "The packages, in the format of pip's requirements, a version and a hash for each.",
)
COUNT = flags.DEFINE_integer(
    "count", 30, "The maximum number of tasks of a package.", lower_bound=1
)
ATTEMPTS = flags.DEFINE_integer(
    "attempts", 100, "The maximum number of changes that are tried in a package.", lower_bound=1
)
SEED = flags.DEFINE_integer("seed", 0, "Seeds the choice of changes.", lower_bound=0)
WORKERS = flags.DEFINE_integer(
    "workers", 2, "The number of packages that are worked on at a time.", lower_bound=1
)
CHECK = flags.DEFINE_bool("check", False, "Whether to play every task by its expert and idle.")


def packages(path: pathlib.Path) -> list[str]:
    """The lines of a requirements file. Raises ValueError for one without version and hash."""
    if not path.is_file():
        raise ValueError(f"no list of packages at {str(path)!r}")
    lines = [line.partition("#")[0].strip() for line in path.read_text("utf-8").splitlines()]
    for line in filter(None, lines):
        if "==" not in line or "--hash=sha256:" not in line:
            raise ValueError(f"{path}: {line!r} must read like 'NAME==VERSION --hash=sha256:...'")
    return [line for line in lines if line]


def download(line: str, folder: pathlib.Path) -> pathlib.Path:
    """The source distribution of a line; raises ValueError where pip does not give it."""
    name, _, version = line.split(maxsplit=1)[0].partition("==")
    pattern = f"{name.replace('-', '?')}-{version}.tar.gz"
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.glob(pattern)):
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
            file.write(line + "\n")
            file.flush()
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
                   "--no-binary=:all:", f"--dest={folder}", "--requirement", file.name]  # fmt: skip
            done = subprocess.run(pip, capture_output=True, text=True, check=False)
        if done.returncode or not any(folder.glob(pattern)):
            raise ValueError(f"pip does not download {name}=={version}: {done.stderr[-500:]}")
    return next(folder.glob(pattern))


def tasks_of(line: str, folder: pathlib.Path, found: Callable[[int], object]) -> list[dict]:
    """Tasks of a package, made now or before. found: told how many there are more."""
    sdist = download(line, folder / "sdists")
    name = sdist.name.removesuffix(".tar.gz")
    if not repository.record_path(folder, name).is_file():
        tasks.record(folder, sdist)
    path = folder / "attempts" / f"{name}-{SEED.value}.jsonl"
    path.parent.mkdir(exist_ok=True)
    written = path.read_bytes() if path.is_file() else b""
    whole = written[: written.rfind(b"\n") + 1]  # a line may be half written
    path.write_bytes(whole)
    tried = [json.loads(entry) for entry in whole.splitlines()]
    done = [task for task in tried if task is not None]
    found(len(done))
    attempts = tasks.attempts(folder, name, SEED.value, len(tried))
    with path.open("a", encoding="utf-8") as file:
        number = len(tried)
        while len(done) < COUNT.value and number < ATTEMPTS.value:
            try:
                task = next(attempts)
            except StopIteration:  # there is no other change
                break
            number += 1
            file.write(json.dumps(task) + "\n")
            file.flush()
            if task is not None:
                done.append(task)
                found(1)
    return done[: COUNT.value]


def main():
    folder, lines = pathlib.Path(entry.given(FOLDER)), packages(pathlib.Path(PACKAGES.value))
    sandbox.check()
    warnings.simplefilter("ignore", SyntaxWarning)  # of the packages
    if not repository.environment_of(folder).is_dir():
        repository.make_environment(folder, ["pytest"])
    total, counts = [], {}
    with (
        tqdm(total=COUNT.value * len(lines), unit="task", desc="software") as bar,
        ThreadPoolExecutor(WORKERS.value) as pool,
    ):
        futures = [pool.submit(tasks_of, line, folder, bar.update) for line in lines]
        for line, future in zip(lines, futures, strict=True):
            try:
                found = future.result()
            except ValueError as error:
                counts[line.split(maxsplit=1)[0]] = f"none: {error}"
                continue
            total += found
            counts[line.split(maxsplit=1)[0]] = str(len(found))
    for name, count in counts.items():
        print(f"{name}: {count}")
    if not total:
        raise ValueError(f"no package of {PACKAGES.value!r} gives a task")
    output = pathlib.Path(entry.given(OUTPUT))
    write_json_lines(output, total)
    read = read_tasks(output)
    environment.check(read)
    for task in tqdm(read, unit="task", desc="check", disable=not CHECK.value):
        if CHECK.value:
            registry.check_rewards(environment.KIND, task)
    print(f"{len(read)} tasks; {output}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["folder", "output"])
    entry.run(main)
