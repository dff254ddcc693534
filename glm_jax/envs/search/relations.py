"""What a knowledge graph may say, and how it is put into words: the kinds of its nodes, the
relations between them, and the numbers that a node may have.
"""

from __future__ import annotations

from typing import NamedTuple


class Kind(NamedTuple):
    """noun: in a question. page: the first words of its page; "": its nodes have no page, and are
    called by their name, as the section `python` is. asked: what a question asks; "": none asks
    it.
    """

    noun: str
    page: str = ""
    asked: str = ""


class Relation(NamedTuple):
    """label: before the object on the subject's page. back: before the subject on the object's
    page; "": only the subject's page states it. active, passive: ways to say it in a question, with
    the subject or the object first.
    """

    label: str
    back: str
    active: tuple[str, ...]
    passive: tuple[str, ...]


class Quantity(NamedTuple):
    """A number that a node has, with its label and unit on the page, and ways to say its range."""

    label: str
    unit: str
    between: tuple[str, ...]


KINDS = {
    "package": Kind("Debian package", "Debian package", "the Debian package"),
    "source": Kind("Debian source package", "Debian source package", "the Debian source package"),
    "person": Kind("maintainer", "Maintainer in Debian", "the person or team in Debian"),
    "concept": Kind("concept", "English noun", "the English noun for the concept"),
    "section": Kind("section"),
    "language": Kind("programming language"),
    "host": Kind("web site"),
    "field": Kind("field"),
}

RELATIONS = {
    "depends_on": Relation(
        "Depends on", "", ("depends on", "cannot work without"), ("is a dependency of",)
    ),
    "recommends": Relation("Recommends", "", ("recommends",), ("is recommended by",)),
    "suggests": Relation("Suggests", "", ("suggests",), ("is suggested by",)),
    "built_from": Relation(
        "Built from", "Builds", ("is built from", "comes out of"), ("is the source of", "builds")
    ),
    "maintained_by": Relation(
        "Maintained by", "Maintains", ("is maintained by", "is in the care of"), ("maintains",)
    ),
    "in_section": Relation("Section", "", ("is in", "is filed under"), ("contains",)),
    "written_in": Relation("Written in", "", ("is written in",), ("is the language of",)),
    "hosted_at": Relation("Home page at", "", ("has its home page at",), ("has the home page of",)),
    "kind_of": Relation("Kind of", "Kinds", ("is a kind of",), ("has among its kinds",)),
    "example_of": Relation("Example of", "Examples", ("is an example of",), ("is exemplified by",)),
    "part_of": Relation("Part of", "Parts", ("is a part of",), ("has as a part",)),
    "member_of": Relation("Member of", "Members", ("is a member of",), ("has as a member",)),
    "in_field": Relation("Field", "", ("belongs to",), ("includes",)),
}

QUANTITIES = {
    "installed_size": Quantity(
        "Installed size", "kB",
        ("takes between {} and {} kB when it is installed", "needs {} to {} kB on the disk"),
    )
}  # fmt: skip
