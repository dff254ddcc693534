"""What experiments.distill does: a run's rollouts on tasks, judged and filtered, become
conversations to fine-tune on.
"""

from __future__ import annotations

import collections
import pathlib
from collections.abc import Iterable, Mapping, Sequence

from tqdm import tqdm

from data import chat_output
from data.chat_reading import read_conversation
from data.tokenizer import Tokenizer
from glm_jax.envs import registry
from glm_jax.envs.episode import SamplingSpec
from glm_jax.evaluation import run_worker
from glm_jax.rollouts.rollout import Group, Rollout, RolloutStatus
from glm_jax.sft import rejection
from glm_jax.sft.conversations import write_conversations
from glm_jax.sft.rejection import RejectionConfig, Sample


def distill(
    workdir: str,
    sources: Sequence[str],
    output: pathlib.Path,
    spec: SamplingSpec,
    num_rows: int,
    config: RejectionConfig,
    *,
    progress: bool,
) -> collections.Counter:
    """Writes what is kept of spec.group_size rollouts of each task. Returns what became of all of
    them, as rejection.select counts it.

    Raises ValueError where nothing is kept; then nothing is written.
    """
    if output.is_dir():
        raise ValueError(f"output {str(output)!r} is a folder: give a file")
    output.parent.mkdir(parents=True, exist_ok=True)
    tasks, worker = run_worker.open_worker(workdir, sources, spec, num_rows)
    with tqdm(
        total=len(tasks) * spec.group_size, unit="rollout", desc="distill", disable=not progress
    ) as bar:
        groups = worker.rollouts(tasks, spec, 0, bar.update)
    conversations, counts = rejection.select(
        list(samples(groups, worker.tokenizer, spec.thinking)), config
    )
    if not conversations:
        became = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise ValueError(
            f"no rollout of {workdir} was kept, {str(output)!r} is not written; of"
            f" {counts.total()}: {became}"
        )
    write_conversations(output, conversations)
    return counts


def samples(groups: Iterable[Group], tokenizer: Tokenizer, thinking: bool) -> Iterable[Sample]:
    """Every rollout as what the filters judge."""
    for group in groups:
        for rollout in group.rollouts:
            prompt, response, tools = group.task.messages, (), group.task.tools
            if rollout.status is RolloutStatus.COMPLETED:
                prompt, response, tools = conversation(rollout, tokenizer)
            yield Sample(
                task=group.task.id, prompt=prompt, response=response, tools=tools,
                thinking=thinking, num_tokens=rollout.num_sampled, status=rollout.status.value,
                reward=rollout.reward.value,
            )  # fmt: skip


def conversation(
    rollout: Rollout, tokenizer: Tokenizer
) -> tuple[tuple[Mapping, ...], tuple[Mapping, ...], tuple[Mapping, ...]]:
    """Of a rollout that can be read: what was asked, what the model and its environment wrote after
    it, and the tools.
    """
    task = rollout.task
    if task.verifier not in registry.ENVIRONMENTS:
        sampled = rollout.tokens[rollout.mask].tolist()
        answer = chat_output.parse_tokens(tokenizer, sampled, task.tools or None)
        return task.messages, (answer,), task.tools
    found = read_conversation(tokenizer, rollout.tokens.tolist())
    turns = [i for i, m in enumerate(found.messages) if m["role"] == "assistant"]
    first = turns[-rollout.num_turns]  # earlier ones were the task's
    return tuple(found.messages[:first]), tuple(found.messages[first:]), tuple(found.tools)


def table(counts: Mapping[str, int]) -> str:
    """A line for what was kept and for every reason of a drop: how many, which share of all."""
    total = sum(counts.values())
    rows = [
        ("rollouts", total),
        ("kept", counts["kept"]),
        *((f"  {name}", n) for name, n in counts.items() if name != "kept"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {count:>8,}  {count / total:>6.1%}" for name, count in rows)
