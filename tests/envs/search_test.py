"""Web search: a small graph written here, whose questions are checked by trying every node, pages
that say what the graph does, tools that no call can break, and an expert that reads.
"""

import concurrent.futures
import dataclasses
import itertools
import json
import random
import re
import sys

import pytest

from glm_jax.envs import registry
from glm_jax.envs.scripted import idle, play
from glm_jax.envs.search import debian, engine, task_maker, tools, web_search, wordnet
from glm_jax.envs.search.brute_force import BruteForce
from glm_jax.envs.search.graph import Fact, Graph, Node, joined, read_graph
from glm_jax.envs.search.language import composed
from glm_jax.envs.search.question import (
    Link,
    Range,
    Thing,
    answers,
    from_json,
    giving_page,
    problem_of,
    stated_on,
    to_json,
)
from glm_jax.envs.search.review import Picks, Review, add_to_file, page_of
from glm_jax.envs.search.short_answer import normalised
from glm_jax.envs.search.walks import LEFT_OUT, Walker, range_of, without_a_link
from glm_jax.rollouts.task import read_tasks

PACKAGES = """\
Package: anvil
Source: smithy (2.0)
Version: 2.0-1
Installed-Size: 120
Maintainer: Ada Smith <ada@example.org>
Depends: libforge1 (>= 2.0), coal | charcoal, nowhere
Recommends: bellows
Homepage: https://www.example.org/anvil
Description: tool that shapes glowing iron
Tag: implemented-in::c, role::program
Section: metal

Package: libforge1
Source: smithy
Installed-Size: 4000
Maintainer: Ada Smith <ada@example.org>
Description: shared routines for furnaces
Section: libs

Package: coal
Installed-Size: 9
Maintainer: Bob Miner <bob@example.org>
Description: fuel from deep tunnels
Section: fuel

Package: bellows
Installed-Size: 45
Maintainer: Bob Miner <bob@example.org>
Suggests: coal
Description: blows air
 into the furnaces
Section: metal

Package: bellows
Installed-Size: 99
Maintainer: Somebody Else <else@example.org>
Description: an older version
Section: metal
"""
NOUNS = """\
  1 This software and database is being provided to you
00000010 05 n 02 dog 0 domestic_dog 0 002 @ 00000020 n 0000 #m 00000030 n 0000 | a tame canid; "a"
00000020 05 n 01 canid 0 001 ~ 00000010 n 0000 | a carnivore with long legs
00000030 14 n 01 pack 0 001 %m 00000010 n 0000 | a group of hunting canids
00000040 18 n 01 Laika 0 001 @i 00000010 n 0000 | the first dog in orbit
"""


def number_of(graph, kind, name):
    [number] = [i for i, n in enumerate(graph.nodes) if n.kind == kind and name in n.names]
    return number


def random_graph(seed, packages=60):
    """Packages with descriptions of words that come again, sources and a few maintainers."""
    lots = random.Random(seed)
    words = [a + b for a, b in itertools.product(("red", "blue", "gold", "grey"), ("fish", "bird"))]
    stanzas = []
    for i in range(packages):
        needs = ", ".join(f"pkg{j}" for j in lots.sample(range(packages), 3) if j != i)
        about = " ".join(lots.sample(words, 3))
        stanzas.append(
            f"Package: pkg{i}\nSource: src{i // 2}\nInstalled-Size: {lots.randint(10, 9000)}\n"
            f"Maintainer: Person {i // 6} <p@example.org>\nDepends: {needs}\n"
            f"Section: s{i % 4}\nDescription: {about}"
        )
    return debian.graph_of("\n\n".join(stanzas))


@pytest.fixture(scope="module")
def graph():
    return joined(debian.graph_of(PACKAGES), wordnet.graph_of(NOUNS))


@pytest.fixture(scope="module")
def larger():
    return random_graph(0)


@pytest.fixture(scope="module")
def corpus(larger, tmp_path_factory):
    folder = tmp_path_factory.mktemp("search") / "corpus"
    task_maker.write_corpus(folder, larger, lambda: None)
    return str(folder)


@pytest.fixture(scope="module")
def tasks(larger, corpus):
    found, fates = task_maker.make_tasks(larger, corpus, 12, 0, lambda: None)
    assert fates["made"] == 12
    return found


# --- graphs and pages ---


def test_debian_and_wordnet_become_facts_with_their_pages(graph):
    assert [n.kind for n in graph.nodes].count("package") == 4  # the first version of each
    name = lambda i: graph.nodes[i].names[0]
    said = {
        (name(s), r, o if r == "installed_size" else name(o), name(p)) for s, r, o, p in graph.facts
    }
    assert said >= {
        ("anvil", "depends_on", "libforge1", "anvil"), ("anvil", "depends_on", "coal", "anvil"),
        ("anvil", "recommends", "bellows", "anvil"), ("bellows", "suggests", "coal", "bellows"),
        ("anvil", "in_section", "metal", "anvil"), ("anvil", "written_in", "c", "anvil"),
        ("anvil", "installed_size", 120, "anvil"), ("anvil", "built_from", "smithy", "anvil"),
        ("anvil", "built_from", "smithy", "smithy"), ("coal", "built_from", "coal", "coal"),
        ("smithy", "maintained_by", "Ada Smith", "smithy"),
        ("smithy", "maintained_by", "Ada Smith", "Ada Smith"),
        ("smithy", "hosted_at", "example.org", "smithy"),
        ("dog", "kind_of", "canid", "dog"), ("dog", "kind_of", "canid", "canid"),
        ("dog", "member_of", "pack", "pack"), ("Laika", "example_of", "dog", "Laika"),
        ("Laika", "in_field", "people", "Laika"),
    }  # fmt: skip
    assert len([f for f in graph.facts if f.relation == "depends_on"]) == 2
    dog = graph.nodes[number_of(graph, "concept", "domestic dog")]
    assert dog == Node("concept", ("dog", "domestic dog"), "a tame canid")
    bellows = graph.nodes[number_of(graph, "package", "bellows")]
    assert bellows.about == "blows air into the furnaces"


def test_a_page_says_what_the_facts_do(graph):
    pages = {title: text for _, title, text in graph.pages()}
    force, coal = (number_of(graph, "package", n) for n in ("libforge1", "coal"))
    assert pages["anvil"] == (
        "anvil\nDebian package. tool that shapes glowing iron\n"
        f"Depends on: libforge1 [{force}]; coal [{coal}]\n"
        f"Recommends: bellows [{number_of(graph, 'package', 'bellows')}]\nSection: metal\n"
        f"Written in: c\nInstalled size: 120 kB\n"
        f"Built from: smithy [{number_of(graph, 'source', 'smithy')}]\n"
    )
    assert f"Maintains: smithy [{number_of(graph, 'source', 'smithy')}]" in pages["Ada Smith"]
    assert "Also called: domestic dog\n" in pages["dog"] and "metal" not in pages


def test_a_graph_comes_back_from_its_folder(graph, tmp_path):
    graph.write(tmp_path)
    again = read_graph(tmp_path)
    assert again.nodes == graph.nodes and again.facts == graph.facts
    (tmp_path / "facts.jsonl").unlink()
    with pytest.raises(ValueError, match="has no facts.jsonl: make it with python -m"):
        read_graph(tmp_path)


@pytest.mark.parametrize(
    ("fact", "message"),
    [
        (Fact(0, "loves", 1, 0), "unknown relation; valid: depends_on, "),
        (Fact(0, "depends_on", 2, 0), "unknown node; valid: 0 to 1"),
        (Fact(0, "in_section", 1, 1), "its page must be that of its subject or its object"),
    ],
)
def test_a_fact_that_cannot_be_is_named(fact, message):
    nodes = [Node("package", ("a",), ""), Node("section", ("b",), "")]
    with pytest.raises(ValueError, match=re.escape(message)):
        Graph(nodes, [fact])


# --- questions ---


def random_question(graph, lots):
    """Anything that can be asked, whether it makes sense or not."""

    def thing(depth):
        node = lots.randrange(len(graph.nodes))
        kind, names, about = graph.nodes[node]
        words = lots.sample(sorted(set(about.split())), min(len(about.split()), lots.randrange(3)))
        ranges = [Range("installed_size", low := lots.randrange(5000), low + 3000)]
        relations = ("depends_on", "built_from", "maintained_by", "in_section")
        links = [
            Link(lots.choice(relations), lots.random() < 0.5, thing(depth - 1))
            for _ in range(lots.randrange(3) if depth else 0)
        ]
        return Thing(
            node, kind, names[0] if lots.random() < 0.1 else "", about * (lots.random() < 0.1),
            tuple(w for w in words if len(w) > 3), tuple(ranges[: lots.random() < 0.3]),
            tuple(links),
        )  # fmt: skip

    return thing(3)


def test_answers_are_those_of_trying_every_node(larger):
    """Of questions that were made, which hold of something, and of any others."""
    lots, oracle, walker, sizes = random.Random(0), BruteForce(larger), Walker(larger, 1), set()
    made = [walker.draft() for _ in range(20)]
    questions = [d.said([lots.randrange(len(ways)) for ways in d.choices]) for d in made]
    for thing in [*questions, *(random_question(larger, lots) for _ in range(300))]:
        for asked in (thing, *without_a_link(thing)):
            found = answers(larger, asked)
            assert sorted(found) == oracle.answers(asked), asked
            sizes.add(len(found))
    assert {0, 1} <= sizes and len(sizes) > 10


def test_made_questions_have_one_answer_which_no_page_gives(larger, tasks):
    oracle = BruteForce(larger)
    assert len({str(task.answer["names"]) for task in tasks}) == 12
    for task in tasks:
        thing = web_search.clues_of(task)
        assert oracle.answers(thing) == [thing.node]
        assert 2 <= thing.hops <= 4
        assert list(larger.nodes[thing.node].names) == task.answer["names"]
        assert not oracle.pages_that_suffice(thing, thing.node)
        for page in range(len(larger.nodes)):  # the clues that it can check leave others
            assert len(oracle.answers(stated_on(larger, thing, page))) > 1
        for less in without_a_link(thing):
            assert len(oracle.answers(less)) > 1


def test_a_page_that_gives_the_answer_is_found(graph):
    """Coal is what anvil depends on and bellows suggests: two pages. That bellows suggest it and
    what bellows are stands on one; libforge1's description and size are on its own.
    """
    number = lambda name: number_of(graph, "package", name)
    anvil, bellows = (
        Thing(number(name), "package", words=(word,))
        for name, word in (("anvil", "iron"), ("bellows", "blows"))
    )  # fmt: skip
    links = (Link("depends_on", False, anvil), Link("suggests", False, bellows))
    both = Thing(number("coal"), "package", links=links)
    assert answers(graph, both) == {number("coal")}
    assert giving_page(graph, both) in (number("anvil"), number("bellows"))
    assert "gives the answer by itself" in problem_of(graph, both)
    own = Thing(number("libforge1"), "package", words=("routines",), links=(links[0],))
    assert giving_page(graph, own) is not None
    ada = Thing(number_of(graph, "person", "Ada Smith"), "person", name="Ada Smith")
    source = Thing(
        number_of(graph, "source", "smithy"), "source", links=(Link("maintained_by", True, ada),)
    )
    chain = Thing(
        number("libforge1"), "package", ranges=(Range("installed_size", 3000, 5000),),
        links=(Link("built_from", True, source),),
    )  # fmt: skip
    assert problem_of(graph, chain).startswith("the page 'libforge1' gives the answer")
    wider = dataclasses.replace(chain, ranges=(Range("installed_size", 100, 5000),))
    assert problem_of(graph, wider).startswith("has 2 answers, not one: anvil, libforge1")
    coal = Thing(number("coal"), "package", ranges=(Range("installed_size", 0, 10),))
    assert "gives the answer" in problem_of(graph, coal)
    # A walk from anvil to smithy to libforge1, whose clue is true of anvil itself, too: its page.
    back = Thing(number("libforge1"), "package", words=("shapes",))
    smithy = number_of(graph, "source", "smithy")
    away = Thing(smithy, "source", links=(Link("built_from", False, back),))
    loop = Thing(
        number("anvil"), "package", ranges=(Range("installed_size", 100, 200),),
        links=(Link("built_from", True, away),),
    )  # fmt: skip
    assert giving_page(graph, loop) == number("anvil")
    wide = dataclasses.replace(loop, ranges=(Range("installed_size", 100, 5000),))
    assert giving_page(graph, wide) == number("anvil")  # all of it stands there
    assert BruteForce(graph).pages_that_suffice(wide, number("anvil")) == [number("anvil")]
    wrong = dataclasses.replace(coal, node=number("anvil"))
    assert problem_of(graph, wrong) == "has 1 answers, not one: coal"


def test_questions_are_the_same_for_a_seed_and_blurred(larger):
    made = lambda seed: [q for q in Walker(larger, seed).questions(40) if q is not None]
    assert made(3) == made(3) and made(3) != made(4)
    for thing in made(3):
        inner = [t for t in thing.all() if t.links]
        assert not any(t.name for t in inner) and not any(t.about for t in [thing])
        text = composed(thing, 5)
        assert text == composed(thing, 5)
        named = {t.name for t in thing.all()}
        said = set(re.findall(r"“(.*?)”", text)) | {""}
        words = {word for t in thing.all() for word in t.words}
        assert said == named | words | {t.about for t in thing.all()} | {""}


def test_a_range_holds_its_number_and_widens():
    for number, spread in itertools.product((0, 1, 9, 46, 120, 999, 64001), (1.1, 1.5, 3.0)):
        found = range_of("installed_size", number, spread)
        assert found.low <= number < found.high
        assert found.low <= number / spread and found.high >= number * spread


def test_levels_say_more_and_leave_out(larger):
    draft = Walker(larger, 0).draft()
    exact = draft.said(draft.exact)
    assert all(t.name for t in list(exact.all())[:-1] if t.node != exact.node)
    none = draft.said([LEFT_OUT] * (len(draft.choices) - 1) + [0])
    assert none.says_nothing and none.node == exact.node


def test_clues_come_back_from_json(tasks):
    for task in tasks:
        thing = from_json(json.loads(json.dumps(task.answer["clues"])))
        assert to_json(thing) == task.answer["clues"] and thing == web_search.clues_of(task)


# --- tools ---


def call(name, arguments):
    return {"function": {"name": name, "arguments": json.dumps(arguments)}}


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("search", {}, "error: query=None must be text"),
        ("search", {"query": 7}, "error: query=7 must be text"),
        ("search", {"query": " "}, "error: query=' ' must be text"),
        ("search", {"query": "x" * 501}, "error: a query of 501 characters; at most 500"),
        ("search", {"query": "fish", "k": 10**9}, "error: k=1000000000 must be a number from 1 to"),
        ("search", {"query": "fish", "k": 0}, "error: k=0 must be a number from 1 to 20"),
        ("search", {"query": "fish", "k": True}, "error: k=True must be a number from 1 to 20"),
        ("search", {"query": "fish", "k": [1]}, "error: k=[1] must be a number from 1 to 20"),
        ("search", {"query": "+-&& || ! ( ) { } [ ] ^ ~ * ? : /"}, "no page was found"),
        ("search", {"query": '"'}, "no page was found"),
        ("open", {}, "error: no page None; valid are the numbers in brackets"),
        ("open", {"page": 10**6}, "error: no page 1000000; valid"),
        ("open", {"page": -1}, "error: no page -1; valid"),
        ("open", {"page": 10**30}, "error: no page 1000000"),
        ("open", {"page": "pkg1"}, "error: no page 'pkg1'; valid"),
        ("open", {"page": {"a": "b" * 999}}, "error: no page {'a': 'bbb"),
        ("open", {"page": 1, "from": 10**6}, "error: from=1000000 must be a number from 0 to "),
        ("open", {"page": 1, "from": "x"}, "error: from='x' must be a number from 0 to "),
        ("browse", {"page": 1}, "error: no tool 'browse'; valid: search, open"),
    ],
)  # fmt: skip
def test_a_bad_call_gets_an_error_that_says_what_is_valid(corpus, name, arguments, message):
    found = tools.result(engine.corpus_at(corpus), call(name, arguments))
    assert found.startswith(message) and len(found) < 200


@pytest.mark.parametrize(
    "broken",
    [{}, {"function": None}, {"function": {"name": "open"}},
     {"function": {"name": "open", "arguments": "{"}},
     {"function": {"name": "open", "arguments": "[" * 10**5}},
     {"function": {"name": "search", "arguments": {"query": "\ud800"}}}],
)  # fmt: skip
def test_a_call_without_arguments_is_an_error_too(corpus, broken):
    assert tools.result(engine.corpus_at(corpus), broken).startswith("error: ")


@pytest.mark.parametrize("query", ["AND", "fish AND", "NOT fish", "title:fish", "fish^x", "a IN b"])
def test_words_of_the_query_language_are_words(corpus, query):
    found = tools.result(engine.corpus_at(corpus), call("search", {"query": query}))
    assert not found.startswith("error")


def test_a_search_finds_titles_words_and_links(larger, corpus):
    opened = engine.corpus_at(corpus)
    assert opened is engine.corpus_at(corpus)
    for number in range(0, 60, 7):
        assert opened.search(f"pkg{number}", 1)[0].page == number
        linking = {h.page for h in opened.search(f'"pkg{number} {number}"', 20)}
        of_node = [f for f in larger.facts if number in (f.subject, f.object)]
        stating = {f.page for f in of_node if f.relation != "installed_size"}
        assert linking == stating - {number}
    text = tools.search(opened, {"query": "pkg3", "k": 2})
    assert text.startswith("[3] pkg3: ") and text.count("\n") == 1


def test_a_long_page_is_read_in_parts(tmp_path):
    facts = [Fact(i, "maintained_by", 0, 0) for i in range(1, 900)]
    nodes = [Node("person", ("Busy Team",), ""),
             *(Node("source", (f"source-{i}",), "") for i in range(1, 900))]  # fmt: skip
    graph = Graph(nodes, facts)
    task_maker.write_corpus(tmp_path / "corpus", graph, lambda: None)
    opened = engine.corpus_at(str(tmp_path / "corpus"))
    whole, start, parts = next(iter(graph.pages()))[2], 0, []
    while True:
        found = tools.open_page(opened, {"page": 0, "from": str(start)})
        text, note = found.rsplit("\n(", 1)
        parts.append(text)
        assert len(text) <= tools.WINDOW and note.startswith(f"characters {start} to ")
        more = re.search(r"go on with from=(\d+)\)$", note)
        if more is None:
            break
        start = int(more[1])
    assert "".join(parts) == whole and len(parts) > 4


def test_many_threads_search_one_index(corpus):
    opened = engine.corpus_at(corpus)
    asked = [(f"pkg{i % 60}", i % 60) for i in range(400)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda q: (opened.search(q[0], 3), opened.page(q[1])), asked))
    for (query, number), (hits, page) in zip(asked, found, strict=True):
        assert hits[0].page == number and page.title == query


# --- episodes ---


def test_the_expert_earns_1_and_doing_nothing_0_in_every_task(tasks):
    for task in tasks:
        played = play(web_search.WebSearch(), task, web_search.expert(task))
        assert played.reward == 1 and play(web_search.WebSearch(), task, idle).reward == 0
        tool = [m["content"] for m in played.messages if m["role"] == "tool"]
        assert any(text.startswith(task.answer["names"][0] + "\n") for text in tool)
    registry.check(tasks)


def test_the_expert_answers_what_the_pages_say(tasks, larger, tmp_path):
    """Where other pages are read, it does not know the answer; where the title changed, it says
    the new one.
    """
    task = next(t for t in tasks if t.answer["clues"].get("words"))  # of the answer's description
    thing = web_search.clues_of(task)
    nodes = list(larger.nodes)
    old = nodes[thing.node]
    nodes[thing.node] = old._replace(names=("renamed",))
    task_maker.write_corpus(tmp_path / "renamed", Graph(nodes, larger.facts), lambda: None)
    answer = lambda folder: play(
        web_search.WebSearch(),
        dataclasses.replace(task, answer={**task.answer, "corpus": str(tmp_path / folder)}),
        web_search.expert(task),
    ).messages[-1]["content"]
    assert answer("renamed") == "\\boxed{renamed}"
    nodes[thing.node] = old._replace(about="something else")
    task_maker.write_corpus(tmp_path / "described", Graph(nodes, larger.facts), lambda: None)
    assert answer("described") == "I could not find it."
    facts = [f for f in larger.facts if f.relation == "installed_size"]
    task_maker.write_corpus(tmp_path / "no_links", Graph(larger.nodes, facts), lambda: None)
    assert answer("no_links") == "I could not find it."


@pytest.mark.parametrize(
    ("content", "reward", "answered"),
    [
        ("It is \\boxed{NAME}.", 1, 1), ("\\boxed{ the  Name }", 1, 1), ("\\boxed{\"name\"}", 1, 1),
        ("\\boxed{\\text{NAME}}", 1, 1), ("NAME", 0, 0), ("", 0, 0), ("\\boxed{}", 0, 0),
        ("\\boxed{NAME, other}", 0, 1), ("\\boxed{NAME or other}", 0, 1), ("\\boxed{NAM}", 0, 1),
        ("\\boxed{NAME} \\boxed{other}", 0, 1), ("\\boxed{NAMENAME}", 0, 1),
    ],
)  # fmt: skip
def test_only_the_name_alone_is_right(tasks, content, reward, answered):
    name = tasks[0].answer["names"][0]
    said = content.replace("NAME", name).replace("Name", name.title()).replace("name", name.upper())
    episode = web_search.WebSearch()
    start = episode.reset(tasks[0], 0)
    assert [t["function"]["name"] for t in start.tools] == ["search", "open"]
    step = episode.step({"content": said})
    assert step.done and step.reward.value == reward and step.reward.parts["answered"] == answered


@pytest.mark.parametrize(
    ("text", "same"),
    [("The Art of  X-ray!", "art of x ray"), ("g++", "g++"), ("A", "a"), ("ﬁsh_tank", "fish tank")],
)
def test_what_counts_as_the_same_answer(text, same):
    assert normalised(text) == same
    assert normalised("g++") != normalised("g")


def test_a_thousand_calls_in_a_turn_are_cut(tasks):
    episode = web_search.WebSearch()
    episode.reset(tasks[0], 0)
    step = episode.step({"content": "", "tool_calls": [call("search", {"query": "fish"})] * 1000})
    assert not step.done and len(step.messages) == tools.MAX_CALLS + 1
    assert step.messages[-1]["content"] == "error: 992 more calls not made; at most 8 a turn"


def changed(task, **fields):
    return dataclasses.replace(task, answer={**task.answer, **fields})


def test_a_bad_task_is_named_with_its_value(tasks, tmp_path):
    task = tasks[0]
    clues = task.answer["clues"]
    without = {k: v for k, v in clues.items() if k not in ("words", "ranges", "links")}
    link = clues["links"][0]
    cases = [
        (dataclasses.replace(task, answer="pkg1"), "its answer must be an object with names, "),
        (changed(task, names=[]), "names=[] must be a list of names"),
        (changed(task, names=["pkg"]), "names=['pkg'] must be ['"),
        (changed(task, corpus=5), "corpus=5 must be a folder that experiments.search_tasks made"),
        (changed(task, corpus=str(tmp_path)), "has no search index: make it with python -m exp"),
        (changed(task, clues=without), " answers, not one: "),
        (changed(task, clues=[]), "clues=[] must be an object"),
        (changed(task, clues={**clues, "kind": "planet"}), "clues.kind: 'planet' is not one of pa"),
        (changed(task, clues={**clues, "words": ["x.*"]}), "clues.words='x.*' must be a word of 4"),
        (changed(task, clues={**clues, "size": 1}), "clues: 'size' is not one of node, kind, "),
        (changed(task, clues={**clues, "node": 10**6}), "unknown node 1000000; valid: 0 to "),
        (changed(task, clues={**clues, "links": [{**link, "relation": "loves"}]}),
         "clues.links[0].relation: 'loves' is not one of depends_on"),
        (changed(task, clues={**clues, "links": [{**link, "forward": "yes"}]}),
         "clues.links[0].forward='yes' must be true or false"),
    ]  # fmt: skip
    said = ({"role": "user", "content": f"Is it {task.answer['names'][0]}?"},)
    cases.append((dataclasses.replace(task, messages=said), "its question says its answer"))
    for bad, message in cases:
        with pytest.raises(ValueError, match=f"task '{task.id}': .*{re.escape(message)}"):
            registry.check([tasks[1], bad])


def test_tasks_are_the_same_again_and_come_back_from_their_file(tasks, larger, corpus, tmp_path):
    again, _ = task_maker.make_tasks(larger, corpus, 12, 0, lambda: None)
    assert again == tasks
    parts = task_maker.split(tasks)
    assert sum(map(len, parts.values())) == 12
    file = tmp_path / "tasks.jsonl"
    file.write_text("".join(json.dumps(dataclasses.asdict(t)) + "\n" for t in tasks))
    read = read_tasks(file)
    registry.check(read)
    assert [web_search.clues_of(t) for t in read] == [web_search.clues_of(t) for t in tasks]
    with pytest.raises(ValueError, match="count=500: the graph gives only"):
        small = random_graph(1, packages=8)
        task_maker.write_corpus(tmp_path / "small", small, lambda: None)
        task_maker.MAX_TRIES, tries = 1, task_maker.MAX_TRIES
        try:
            task_maker.make_tasks(small, str(tmp_path / "small"), 500, 0, lambda: None)
        finally:
            task_maker.MAX_TRIES = tries


def test_shares_are_counted(tasks, larger):
    shares = task_maker.measure(larger, tasks, lambda: None)
    assert shares["expert"] == shares["unique"] == 1 and shares["one_page"] == 0
    clues = tasks[0].answer["clues"]
    vague = changed(tasks[0], clues={"node": clues["node"], "kind": clues["kind"]})
    shares = task_maker.measure(larger, [tasks[0], vague], lambda: None)
    assert shares["unique"] == 0.5 and shares["one_page"] == 0.5


def test_without_tantivy_the_error_names_its_requirements_file(monkeypatch, corpus):
    monkeypatch.setitem(sys.modules, "tantivy", None)
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install -r requirements-search.txt"):
        engine.Corpus(corpus)


# --- with a person in the loop ---


def test_a_person_picks_what_is_said_and_gets_the_same_checks(larger, corpus):
    review, verdicts = Review(larger, corpus, 0), []
    for number in range(8):
        draft = review.draft(number)
        exact, first = Picks(tuple(draft.exact), ""), review.picks(number, {})
        assert len(answers(larger, draft.said(first.levels))) == 1
        vague = {f"level{i}": ["0"] for i in range(len(draft.choices))}
        for picks in (first, exact, review.picks(number, vague)):
            task, problem = review.task(number, picks)
            thing = web_search.clues_of(task)
            if problem is None:
                registry.check([task])
            assert (problem or "").startswith("has ") == (len(answers(larger, thing)) != 1)
            verdicts.append(problem)
            shown = page_of(review, number, picks, "a <verdict>", problem is None)
            assert "a &lt;verdict&gt;" in shown and shown.count("<article>") == len(draft.choices)
        said = Picks(exact.levels, f"Is it {larger.nodes[draft.thing.node].names[0]}?")
        assert review.task(number, said)[1] is not None
    assert None in verdicts and any("answers, not one" in v for v in verdicts if v)
    for level in ("-2", "99", "x", "-1"):
        last = len(review.draft(0).choices) - 1
        with pytest.raises(ValueError, match=f"level{last}='{level}' must be 0 to"):
            review.picks(0, {f"level{last}": [level]})


def test_saved_questions_are_added_to_their_file(larger, corpus, tasks, tmp_path):
    file = tmp_path / "folder" / "reviewed.jsonl"
    for task in tasks[:3]:
        add_to_file(file, json.dumps(dataclasses.asdict(task)))
    assert [t.id for t in read_tasks(file)] == [t.id for t in tasks[:3]]
