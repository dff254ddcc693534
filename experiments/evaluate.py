r"""Measures a checkpoint: held-out text, puzzles, and any task of lm-eval. Prints a table and
writes W/evaluation/<step>.json.

python -m experiments.evaluate --workdir=W --tasks=held_out,arithmetic,logic
python -m experiments.evaluate --workdir=W --tasks=python_syntax,my_task.yaml --limit=100
python -m experiments.evaluate --workdir=W --tasks=human_eval --max_new_tokens=512

Tasks:
  held_out           loss, perplexity and bits per byte of the run's held-out text, of the MTP block
                     as well
  arithmetic, logic  puzzles of reasoning-gym, from seeds and with questions that training never
                     sees
  human_eval         pass@1 of 164 functions to write, run in sandboxes (needs bubblewrap); never
                     trained on
  python_syntax      which of two snippets is Python (data/tasks), by lm-eval
  FILE.jsonl         tasks with their verifiers or environments, as reinforcement learning takes
                     them; --max_turns=1,2,4 shows what further turns are worth
  anything else      a task, group or tag of lm-eval 0.4.13, or the path of a YAML file that
                     describes one
"""

from __future__ import annotations

import pathlib

from absl import flags

from experiments import entry
from glm_jax.evaluation import results, tasks
from glm_jax.evaluation.subject import Settings, open_subject, read_tokenizer

WORKDIR = flags.DEFINE_string(
    "workdir", None, "The work directory of a run, or a Hugging Face folder with a tokenizer.json."
)
TASKS = flags.DEFINE_list("tasks", None, "The names of the tasks, separated by commas; see above.")
STEP = flags.DEFINE_integer(
    "step", None, "The step of the checkpoint to evaluate; by default the newest."
)
OUTPUT = flags.DEFINE_string(
    "output",
    None,
    "The results file to write anew. By default W/evaluation/<step>.json, which keeps the results "
    "of other tasks.",
)
DATA = flags.DEFINE_list(
    "data", [], "The dataset folders of the held_out task; by default those of the run."
)
LIMIT = flags.DEFINE_integer(
    "limit",
    None,
    "Limits the batches of held-out text, puzzles of each generator, problems, and documents of "
    "lm-eval tasks.",
    lower_bound=1,
)
CONTEXT = flags.DEFINE_integer(
    "context",
    None,
    "The maximum number of tokens of prompt and answer; by default the model's, up to 4096.",
    lower_bound=2,
)
NUM_ROWS = flags.DEFINE_integer(
    "num_rows", 16, "The number of prompts that the engine answers at a time.", lower_bound=1
)
BATCH_TOKENS = flags.DEFINE_integer(
    "batch_tokens",
    4096,
    "The number of tokens in a forward pass that scores given text.",
    lower_bound=1,
)
DRAFT_TOKENS = flags.DEFINE_integer(
    "draft_tokens",
    0,
    "The number of tokens that the MTP block drafts; 0 turns speculative decoding off.",
    lower_bound=0,
)
MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens",
    64,
    "The maximum number of tokens of an answer, reasoning included.",
    lower_bound=1,
)
TEMPERATURE = flags.DEFINE_float(
    "temperature",
    0.0,
    "The sampling temperature of answers; 0 always takes the most likely token.",
    lower_bound=0.0,
)
SEED = flags.DEFINE_integer(
    "seed", 0, "Seeds everything that is sampled.", lower_bound=0, upper_bound=2**32 - 1
)
EXAMPLES = flags.DEFINE_integer(
    "examples",
    2,
    "The number of solved training puzzles before each puzzle; a chat has none.",
    lower_bound=0,
)
CHAT = flags.DEFINE_bool(
    "chat",
    False,
    "Asks as a chat and reads answers from \\boxed{} or a fenced block; otherwise as text to "
    "complete.",
)
THINKING = flags.DEFINE_bool("thinking", True, "In a chat, lets the model reason first.")
MAX_TURNS = flags.DEFINE_list(
    "max_turns",
    ["32"],
    "The turns that an episode of a task file may take; several limits are measured one by one.",
)


def main():
    settings = Settings(
        limit=LIMIT.value, context=CONTEXT.value, num_rows=NUM_ROWS.value,
        batch_tokens=BATCH_TOKENS.value,
        draft_tokens=DRAFT_TOKENS.value, max_new_tokens=MAX_NEW_TOKENS.value,
        temperature=TEMPERATURE.value, seed=SEED.value,
        num_examples=EXAMPLES.value, chat=CHAT.value, thinking=THINKING.value,
        max_turns=entry.positive_integers(MAX_TURNS),
    )  # fmt: skip
    path = pathlib.Path(entry.given(WORKDIR))
    tokenizer = read_tokenizer(path)
    prepared = tasks.prepare(entry.given(TASKS), path, DATA.value, tokenizer, settings)
    output, known = results.find_output(path, STEP.value, OUTPUT.value)
    subject = open_subject(path, STEP.value, tokenizer, settings)
    found = tasks.run(prepared, subject, output, known)
    print(results.table({n: entry for n, entry in found.items() if entry["task"] in prepared}))
    print(f"\n{output}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["workdir", "tasks"])
    entry.run(main)
