"""WordNet's nouns as a knowledge graph: what English nouns name, what it is a kind, an example, a
part or a member of.

WordNet 3.0 is Copyright 2006 by Princeton University; its license allows use and copies with that
notice. It is fetched as Debian's package `wordnet-base` by a command (`fetch`) and never part of
this repository.
"""

from __future__ import annotations

import io
import pathlib
import subprocess
import tarfile
import tempfile

from glm_jax.envs.search.graph import Fact, Graph, Node

PACKAGE, MEMBER = "wordnet-base", "./usr/share/wordnet/data.noun"
POINTERS = {"@": "kind_of", "@i": "example_of", "#p": "part_of", "#m": "member_of"}
# Lexicographer files, by their number (WordNet's lexnames(5WN)), of the nouns.
FIELDS = dict(
    enumerate(
        "all kinds,acts,animals,artefacts,attributes,the body,cognition,communication,events,"
        "feelings,food,groups,places,motives,natural objects,people,natural phenomena,plants,"
        "possession,processes,quantities,relations,shapes,states,substances,time".split(","), 3,
    )
)  # fmt: skip


def fetch() -> str:
    """Raises ValueError where there is no apt."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            download = ("apt-get", "download", "-qq", PACKAGE)
            subprocess.run(download, cwd=folder, check=True, capture_output=True, text=True)
            [package] = pathlib.Path(folder).glob("*.deb")
            unpack = ("dpkg-deb", "--fsys-tarfile", str(package))
            tar = subprocess.run(unpack, check=True, capture_output=True).stdout
        except (OSError, subprocess.CalledProcessError) as error:
            raise ValueError(
                f"cannot get Debian's package {PACKAGE} ({error}); on a system without apt give"
                " --wordnet, the file data.noun of WordNet 3.0"
            ) from None
    with tarfile.open(fileobj=io.BytesIO(tar)) as files:
        member = files.extractfile(MEMBER)
        assert member is not None, "the package has the file"
        return member.read().decode("utf-8")


def graph_of(text: str) -> Graph:
    """text: of data.noun; its form is in WordNet's manual page wndb(5WN)."""
    nodes: list[Node] = []
    numbers: dict[str, int] = {}  # of a synset, by its offset in the file
    pointers: list[tuple[int, str, str]] = []
    fields: list[tuple[int, str]] = []
    for line in text.splitlines():
        if line.startswith(" "):  # the licence
            continue
        data, _, gloss = line.partition(" | ")
        offset, file, _, count, *rest = data.split()
        words = 2 * int(count, 16)
        names = tuple(word.replace("_", " ") for word in rest[:words:2])
        number = numbers[offset] = len(nodes)
        nodes.append(Node("concept", names, gloss.partition('; "')[0].strip()))
        fields.append((number, FIELDS[int(file)]))
        links = rest[words + 1 :]
        for symbol, target, part in zip(links[::4], links[1::4], links[2::4], strict=True):
            if symbol in POINTERS and part == "n":
                pointers.append((number, POINTERS[symbol], target))
    facts = []
    for number, relation, target in pointers:
        other = numbers[target]
        facts += [Fact(number, relation, other, page) for page in (number, other)]
    known = {name: len(nodes) + i for i, name in enumerate(FIELDS.values())}
    facts += [Fact(number, "in_field", known[name], number) for number, name in fields]
    return Graph([*nodes, *(Node("field", (name,), "") for name in known)], facts)
