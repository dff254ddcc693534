"""Debian's package metadata as a knowledge graph: packages, the source packages that they are built
from, and who maintains those.

The metadata is that of the main archive, which is free software; it is fetched from Debian by a
command (`fetch`) and never part of this repository.
"""

from __future__ import annotations

import re
import subprocess
import urllib.parse
from collections.abc import Iterator, Mapping

from glm_jax.envs.search.graph import Fact, Graph, Node

FETCH = ("apt-cache", "dumpavail")  # prints the metadata of all packages that apt knows
LINKS = {"Depends": "depends_on", "Recommends": "recommends", "Suggests": "suggests"}


def fetch() -> str:
    """Raises ValueError where there is no apt."""
    try:
        return subprocess.run(FETCH, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(
            f"cannot run `{' '.join(FETCH)}` ({error}); on a system without apt give --packages,"
            " an unpacked Packages file of a Debian mirror"
        ) from None


def stanzas(text: str) -> Iterator[Mapping[str, str]]:
    """The packages of a Packages file as field -> value, its lines joined."""
    for stanza in text.split("\n\n"):
        fields = re.findall(r"^([\w-]+):[ \t]*(.*(?:\n[ \t].*)*)", stanza, re.MULTILINE)
        if fields:
            yield {name: " ".join(value.split()) for name, value in fields}


def graph_of(text: str) -> Graph:
    """text: of a Packages file. Of a package's versions the first counts, of alternatives
    (`exim4 | mail-transport-agent`) too.
    """
    return _Builder(text).graph()


class _Builder:
    def __init__(self, text: str):
        self.nodes: list[Node] = []
        self.numbers: dict[tuple[str, str], int] = {}  # of kind and name
        self.facts: dict[Fact, None] = {}  # in order
        self.fields: dict[str, Mapping[str, str]] = {}
        for fields in stanzas(text):
            self.fields.setdefault(fields["Package"], fields)

    def graph(self) -> Graph:
        for name, fields in self.fields.items():
            about = re.sub(r"\s+", " ", fields.get("Description", "")).strip()
            self.node("package", name, about)
        for name, fields in self.fields.items():
            self.add_package(self.node("package", name), fields)
        return Graph(self.nodes, list(self.facts))

    def node(self, kind: str, name: str, about: str = "") -> int:
        if (kind, name) not in self.numbers:
            self.numbers[kind, name] = len(self.nodes)
            self.nodes.append(Node(kind, (name,), about))
        return self.numbers[kind, name]

    def add(self, subject: int, relation: str, object_: int, *pages: int):
        for page in pages or (subject,):
            self.facts[Fact(subject, relation, object_, page)] = None

    def add_package(self, package: int, fields: Mapping[str, str]):
        name = fields["Package"]
        for field, relation in LINKS.items():
            for clause in fields.get(field, "").split(","):
                target = re.match(r"[^\s(|:]*", clause.strip())
                assert target is not None, "it matches the empty string"
                if target[0] in self.fields and target[0] != name:
                    self.add(package, relation, self.node("package", target[0]))
        if section := fields.get("Section"):
            self.add(package, "in_section", self.node("section", section))
        for language in re.findall(r"implemented-in::([\w+-]+)", fields.get("Tag", "")):
            self.add(package, "written_in", self.node("language", language))
        if (size := fields.get("Installed-Size", "")).isdecimal():
            self.add(package, "installed_size", int(size))
        source = self.node("source", fields.get("Source", name).split()[0])
        self.add(package, "built_from", source, package, source)
        if maintainer := re.sub(r"\s*<.*", "", fields.get("Maintainer", "")).strip('" '):
            person = self.node("person", maintainer.replace(";", ","))
            self.add(source, "maintained_by", person, source, person)
        if host := urllib.parse.urlsplit(fields.get("Homepage", "")).hostname:
            self.add(source, "hosted_at", self.node("host", host.removeprefix("www.")))
