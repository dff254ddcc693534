"""Continues a prompt, or fills in the middle, with a trained checkpoint.

python -m experiments.generate --workdir=W --prompt="def add("
python -m experiments.generate --workdir=W --prompt="def add(a, b):\n    return " --suffix="\n"
"""

from __future__ import annotations

from absl import flags

from data.fim import fim_prompt
from experiments import entry
from glm_jax import load
from glm_jax.infer.engine import generate
from glm_jax.infer.sampling import SamplingParams

WORKDIR = flags.DEFINE_string(
    "workdir", None, "The work directory of a run, or a Hugging Face folder with a tokenizer.json."
)
PROMPT = flags.DEFINE_string("prompt", None, "The text to continue; \\n stands for a line break.")
SUFFIX = flags.DEFINE_string(
    "suffix", None, "The text after the gap: completes the middle between prompt and suffix."
)
LENGTH = flags.DEFINE_integer("length", 128, "The maximum number of new tokens.", lower_bound=1)
TEMPERATURE = flags.DEFINE_float(
    "temperature",
    0.6,
    "The sampling temperature; 0 always takes the most likely token.",
    lower_bound=0.0,
)
TOP_P = flags.DEFINE_float(
    "top_p",
    0.95,
    "Samples from the most likely tokens up to this total probability (nucleus sampling).",
    lower_bound=0.0,
    upper_bound=1.0,
)
SEED = flags.DEFINE_integer("seed", 0, "Seeds sampling; the same seed gives the same text.")


def main():
    model, tokenizer = load(entry.given(WORKDIR))
    if tokenizer is None:
        raise ValueError(f"{WORKDIR.value} has no tokenizer.json")
    prompt = entry.given(PROMPT).replace("\\n", "\n")
    if SUFFIX.value is None:
        suffix, ids = "", [*tokenizer.start_ids, *tokenizer.encode(prompt)]
    else:
        suffix = SUFFIX.value.replace("\\n", "\n")
        ids = fim_prompt(tokenizer, prompt, suffix)
    params = SamplingParams(
        max_new_tokens=LENGTH.value,
        temperature=TEMPERATURE.value,
        top_p=TOP_P.value,
        seed=SEED.value,
        stop_tokens=(tokenizer.eos_id,),
    )
    print(prompt + tokenizer.decode(generate(model, [ids], params)[0].text_tokens) + suffix)


if __name__ == "__main__":
    flags.mark_flags_as_required(["workdir", "prompt"])
    entry.run(main)
