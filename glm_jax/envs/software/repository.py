"""A repository that tasks are made from: the source distribution of a package, with its tests.

A folder of repositories, as experiments.software_tasks makes it:

    sdists/toolz-1.0.0.tar.gz         as the package index has it
    repositories/toolz-1.0.0.json     Record: what its tests do when nothing is changed
    environment/                      pytest and what it needs; sandboxes see it read-only
"""

from __future__ import annotations

import compileall
import dataclasses
import email
import email.message
import functools
import hashlib
import importlib.metadata
import json
import pathlib
import re
import shutil
import tarfile
from collections.abc import Iterable, Mapping

MAX_BYTES = 8 << 20  # of all files of a repository
TEST_FOLDERS = {"test", "tests", "testing"}
LEFT_OUT = {".git", "build", "dist", "docs", "doc", "__pycache__"}  # may hold a second copy

Files = Mapping[str, bytes]  # by their path in the repository


@dataclasses.dataclass(frozen=True)
class Record:
    """sdist, sha256: its file's. tests: what came of each when nothing was changed, `passed`,
    `failed`, `skipped` or `error`, by pytest's name. controls: those that fail once they are
    altered (alteration.py), as an honest run must. seconds: of CPU that they take.
    """

    name: str
    version: str
    license: str
    sdist: str
    sha256: str
    tests: Mapping[str, str]
    controls: tuple[str, ...]
    seconds: float

    @property
    def passed(self) -> list[str]:
        return [test for test, outcome in self.tests.items() if outcome == "passed"]


@dataclasses.dataclass(frozen=True)
class Repository:
    """files: all that the sandbox gets of it. root: what Python imports from, `.` or `src`."""

    name: str
    version: str
    license: str
    root: str
    files: Files

    def is_source(self, path: str) -> bool:
        """Whether a file is Python of the package itself: what a task breaks and an agent mends."""
        parts = pathlib.PurePosixPath(path).parts
        if not path.endswith(".py") or is_test(path) or ".." in parts:
            return False
        above, inside = (parts[:1], parts[1:]) if self.root == "src" else ((), parts)
        if above not in ((), ("src",)) or not inside:
            return False
        if len(inside) == 1:
            return path in self.files
        return "/".join([*above, inside[0], "__init__.py"]) in self.files

    @property
    def sources(self) -> list[str]:
        return sorted(filter(self.is_source, self.files))

    @property
    def test_files(self) -> list[str]:
        names = re.compile(r"(test.*|.*_test)\.py")
        tests = (path for path in self.files if is_test(path))
        return sorted(path for path in tests if names.fullmatch(pathlib.PurePosixPath(path).name))

    @property
    def altered_files(self) -> list[str]:
        """test_files and what they import from beside them."""
        beside = (p for p in self.files if p.endswith(".py") and TEST_FOLDERS & set(p.split("/")))
        return sorted({p for p in beside if not p.endswith("conftest.py")} | {*self.test_files})

    def with_sources(self, sources: Files) -> dict[str, bytes]:
        """Its files with these in the place of its own sources. What is no source is ignored: an
        agent's tests, settings and plugins never count.
        """
        own = {path: data for path, data in self.files.items() if not self.is_source(path)}
        return own | {path: data for path, data in sources.items() if self.is_source(path)}


def is_test(path: str) -> bool:
    """By where it lies and what it is called, as pytest's and everybody's habit is."""
    *folders, name = pathlib.PurePosixPath(path).parts
    stem = name.removesuffix(".py")
    return bool(TEST_FOLDERS & set(folders)) or (
        name in ("conftest.py", "setup.py", "noxfile.py", "tasks.py")
        or stem.startswith("test")
        or stem.endswith("_test")
    )


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "_", name).lower()


def read_sdist(path: pathlib.Path) -> Repository:
    """Raises ValueError where the file is no source distribution with tests, or too big."""
    if not path.is_file():
        raise ValueError(f"no source distribution at {str(path)!r}")
    files = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = member.name.partition("/")[2]
                parts = pathlib.PurePosixPath(name).parts
                if member.isfile() and parts and not LEFT_OUT & set(parts) and ".." not in parts:
                    data = archive.extractfile(member)
                    assert data is not None, "it is a file"
                    files[name] = data.read(MAX_BYTES + 1)
    except tarfile.TarError as error:
        raise ValueError(f"{path}: is no source distribution: {error}") from None
    if (size := sum(map(len, files.values()))) > MAX_BYTES:
        raise ValueError(f"{path}: its files have {size} bytes, at most {MAX_BYTES}")
    if "PKG-INFO" not in files:
        raise ValueError(f"{path}: is no source distribution: it has no PKG-INFO")
    about = email.message_from_bytes(files["PKG-INFO"])
    root = "src" if any(re.fullmatch(r"src/(\w+/__init__|\w+)\.py", p) for p in files) else "."
    name, version = about["Name"], about["Version"]
    # As if it were installed: packages ask for their own version.
    metadata = f"{_normal(name)}-{version}.dist-info/METADATA"
    files[metadata if root == "." else f"{root}/{metadata}"] = files["PKG-INFO"]
    found = Repository(name, version, license_of(about), root, files)
    if not found.sources or not found.test_files:
        missing = "tests" if found.sources else "Python sources"
        raise ValueError(f"{path}: has no {missing}")
    return found


def license_of(about: email.message.Message) -> str:
    """As short as the package says it."""
    classifiers = about.get_all("Classifier") or []
    named = [c.rpartition(" :: ")[2] for c in classifiers if c.startswith("License ::")]
    found = about["License-Expression"] or ", ".join(named) or about["License"] or "not stated"
    return found.strip().splitlines()[0]


# --- the folder ---


def record_path(folder: pathlib.Path, name: str) -> pathlib.Path:
    return folder / "repositories" / f"{name}.json"


def environment_of(folder: pathlib.Path) -> pathlib.Path:
    return folder / "environment"


@functools.lru_cache(maxsize=256)
def load(folder: str, name: str) -> tuple[Repository, Record]:
    """name: as in toolz-1.0.0. Raises ValueError naming what is missing in the folder or has
    changed since.
    """
    path = record_path(pathlib.Path(folder), name)
    if not path.is_file():
        known = sorted(p.stem for p in path.parent.glob("*.json"))
        raise ValueError(
            f"no repository {name!r} in {folder!r}; valid: {', '.join(known) or 'none'}:"
            " experiments.software_tasks makes them"
        )
    entry = json.loads(path.read_text("utf-8"))
    record = Record(**{**entry, "controls": tuple(entry["controls"])})
    sdist = pathlib.Path(folder, "sdists", record.sdist)
    repository = read_sdist(sdist)
    if (found := hashlib.sha256(sdist.read_bytes()).hexdigest()) != record.sha256:
        raise ValueError(f"{sdist}: its sha256 is {found}, not {record.sha256} as in {path}")
    return repository, record


def make_environment(folder: pathlib.Path, distributions: Iterable[str]):
    """Copies installed distributions, with all that they need, into the folder's environment."""
    target = folder / "environment.new"  # a half-made one must not be taken for it
    shutil.rmtree(target, ignore_errors=True)
    left, seen = list(distributions), set()
    while left:
        name = _normal(left.pop())
        if name in seen:
            continue
        seen.add(name)
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            raise ValueError(
                f"{name!r} is not installed; pytest of requirements-dev.txt is"
            ) from None
        left += [
            re.split(r"[^\w.-]", line, maxsplit=1)[0]
            for line in found.requires or ()
            if ";" not in line
        ]
        for file in found.files or ():
            source = pathlib.Path(str(found.locate_file(file)))
            if ".." not in file.parts and file.suffix != ".pyc" and source.is_file():
                (target / file).parent.mkdir(parents=True, exist_ok=True)
                (target / file).write_bytes(source.read_bytes())
    target.rename(environment_of(folder))
    compileall.compile_dir(environment_of(folder), quiet=2)  # the names of files are in it
