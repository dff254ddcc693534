"""Makes a corpus for the environment `search`, its search engine's index, and tasks: questions that
take several of its pages, each with one answer.

python -m experiments.search_tasks --corpus=W/corpus --output=W --count=1000
python -m experiments.search_tasks --corpus=W/corpus --output=W/more --count=1000 --seed=1 --measure

The corpus is made where it is not there yet, of Debian's package metadata and of WordNet's nouns,
which apt fetches. Without apt give --packages and --wordnet.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import time

from absl import flags
from tqdm import tqdm

from experiments import entry
from glm_jax.envs.search import debian, task_maker, wordnet
from glm_jax.envs.search.graph import Graph, joined, read_graph
from glm_jax.files import write_json_lines

CORPUS = flags.DEFINE_string(
    "corpus", None, "The folder of the corpus; tasks name it as it is given here."
)
OUTPUT = flags.DEFINE_string(
    "output", None, "The folder to which train.jsonl and held_out.jsonl are written."
)
COUNT = flags.DEFINE_integer("count", 1000, "The number of tasks.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Seeds the walks and the words.", lower_bound=0)
SOURCES = flags.DEFINE_list(
    "sources", ["debian", "wordnet"], "What a new corpus is made of: debian, wordnet or both."
)
PACKAGES = flags.DEFINE_string(
    "packages", None, "An unpacked Packages file of Debian's; without it apt-cache prints one."
)
WORDNET = flags.DEFINE_string(
    "wordnet", None, "WordNet's data.noun; without it apt-get downloads the package wordnet-base."
)
MEASURE = flags.DEFINE_bool(
    "measure", False, "Checks every task by brute force, and prints the shares."
)


def read_source(name: str) -> Graph:
    modules = {"debian": (debian, PACKAGES), "wordnet": (wordnet, WORDNET)}
    if name not in modules:
        raise ValueError(f"--sources: {name!r} is not one of {', '.join(modules)}")
    module, file = modules[name]
    text = pathlib.Path(file.value).read_text("utf-8") if file.value else module.fetch()
    return module.graph_of(text)


def open_graph(folder: pathlib.Path) -> Graph:
    """The graph of a corpus, which is made where it is not there."""
    if task_maker.is_corpus(folder):
        return read_graph(folder)
    if not SOURCES.value:
        raise ValueError("--sources is empty; valid: debian, wordnet")
    graph = functools.reduce(joined, map(read_source, SOURCES.value))
    print(f"{len(graph.nodes):,} nodes, {len(graph.facts):,} facts on their pages")
    started = time.perf_counter()
    with tqdm(unit="page", desc="index") as bar:
        task_maker.write_corpus(folder, graph, bar.update)
    print(f"corpus in {folder}, written in {time.perf_counter() - started:.1f} s")
    return graph


def main():
    folder, output = pathlib.Path(entry.given(CORPUS)), pathlib.Path(entry.given(OUTPUT))
    graph = open_graph(folder)
    with tqdm(total=COUNT.value, unit="task", desc="tasks") as bar:
        tasks, fates = task_maker.make_tasks(
            graph, entry.given(CORPUS), COUNT.value, SEED.value, bar.update
        )
    print("drafts: " + ", ".join(f"{count:,} {fate}" for fate, count in fates.most_common()))
    for name, part in task_maker.split(tasks).items():
        write_json_lines(output / f"{name}.jsonl", [dataclasses.asdict(task) for task in part])
        print(f"{len(part)} tasks in {output / name}.jsonl")
    if MEASURE.value:
        with tqdm(total=len(tasks), unit="task", desc="brute force") as bar:
            shares = task_maker.measure(graph, tasks, bar.update)
        print(", ".join(f"{name} {share:.1%}" for name, share in shares.items()))


if __name__ == "__main__":
    flags.mark_flags_as_required(["corpus", "output"])
    entry.run(main)
