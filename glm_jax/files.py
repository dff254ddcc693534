"""Text files that appear, or change, as a whole: a reader sees the old one or the new one."""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import Iterable, Mapping


@contextlib.contextmanager
def naming(path: pathlib.Path):
    """An OSError that says which file could not be written: a full disk's own does not."""
    try:
        yield
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error


def write_text(path: pathlib.Path, text: str):
    """Writes a UTF-8 file beside its place, with the folders that it needs, and moves it there.
    Raises OSError naming the path; then the old file stands.
    """
    partial = path.with_name(f".{path.name}.partial")
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_text(text, "utf-8")
            partial.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise


def write_json_lines(path: pathlib.Path, records: Iterable[Mapping]):
    """One object a line."""
    write_text(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
