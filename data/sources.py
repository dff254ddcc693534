"""Corpora: where documents come from. A source only walks and reads; splitting and tokenizing are
curation's.
"""

import dataclasses
import os
import pathlib
import sysconfig
from collections.abc import Iterator

# Installed packages lie inside the standard library's folder on most systems but are no part of it.
_NOT_STDLIB = frozenset({"site-packages", "dist-packages", "__pycache__"})


@dataclasses.dataclass(frozen=True)
class Document:
    """One file of a corpus.

    path: relative to the corpus root, with forward slashes, so that it is the same on every
    machine.
    content: the file's bytes, undecoded; `text` decodes them.
    is_code: whether fill-in-the-middle may rearrange it.
    """

    path: str
    content: bytes
    is_code: bool

    def is_text(self) -> bool:
        """Whether the content is UTF-8."""
        try:
            self.text()
        except UnicodeDecodeError:
            return False
        return True

    def text(self) -> str:
        """The content as text, line ends kept. Raises UnicodeDecodeError where it is not UTF-8."""
        return self.content.decode("utf-8")


def stdlib_documents() -> Iterator[Document]:
    """The Python files of the running interpreter's standard library, tests included, sorted by
    path.

    About 1,790 files and 31 MB for CPython 3.11. Raises ValueError where the library is not on disk
    as files.
    """
    root = sysconfig.get_paths()["stdlib"]
    paths = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _NOT_STDLIB]
        paths += [pathlib.Path(folder, name) for name in names if name.endswith(".py")]
    if not paths:
        raise ValueError(
            f"no Python files in the standard library folder {root!r} of this interpreter"
        )
    yield from _read(pathlib.Path(root), paths, (".py",))


def file_documents(root: str, pattern: str, code_suffixes: tuple[str, ...]) -> Iterator[Document]:
    """Files under `root` that match the glob `pattern` (`**/*.py`), sorted by path.

    code_suffixes: names ending so are code. Raises ValueError where there is no such folder or no
    file matches.
    """
    if not os.path.isdir(root):
        raise ValueError(f"source folder {root!r} does not exist or is no folder")
    paths = [path for path in pathlib.Path(root).glob(pattern) if path.is_file()]
    if not paths:
        raise ValueError(f"no file in {root!r} matches the pattern {pattern!r}")
    yield from _read(pathlib.Path(root), paths, code_suffixes)


def _read(
    root: pathlib.Path, paths: list[pathlib.Path], code_suffixes: tuple[str, ...]
) -> Iterator[Document]:
    relative = sorted(path.relative_to(root).as_posix() for path in paths)
    for path in relative:
        yield Document(path, (root / path).read_bytes(), path.endswith(code_suffixes))
