"""The glossary of metrics, docs/guides/metrics.md, as tests read it."""

import pathlib
import re

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "guides" / "metrics.md"


def rows() -> dict[str, str]:
    """Key as written, `<...>` for what varies -> the runs that write it: `train`, `rl` or `all`."""
    found = re.findall(r"^\| `([^`]+)` \| (\w+) \|", PAGE.read_text("utf-8"), re.MULTILINE)
    assert found and len(dict(found)) == len(found)
    return dict(found)


def matches(key: str, name: str) -> bool:
    parts = re.split(r"<\w+>", key)
    return re.fullmatch(".+".join(map(re.escape, parts)), name) is not None


def of_kind(kind: str) -> list[str]:
    return [key for key, kinds in rows().items() if kinds in (kind, "all")]


def unknown(records: list[dict], kind: str) -> list[str]:
    """Names in a run's records that the glossary lacks."""
    names = {name for record in records for name in record}
    return sorted(n for n in names if not any(matches(key, n) for key in of_kind(kind)))


def unseen(records: list[dict], kind: str) -> set[str]:
    """Keys of the glossary that no record has."""
    names = {name for record in records for name in record}
    return {key for key in of_kind(kind) if not any(matches(key, name) for name in names)}
