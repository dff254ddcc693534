"""Serves a trained checkpoint with OpenAI's HTTP API: chat and text completions, models, health,
metrics.

python -m experiments.serve --workdir=W
python -m experiments.serve --workdir=W --host=0.0.0.0 --port=8000 --api_key_file=key.txt \
    --num_rows=32 --draft_tokens=1

Prints one line with its address when it is ready. SIGTERM and Ctrl-C let the requests under way
end, up to --drain_seconds.
"""

from __future__ import annotations

import resource
import signal
import sys

from absl import flags

from experiments import entry
from glm_jax import load
from glm_jax.infer.config import EngineConfig
from glm_jax.infer.engine import Engine
from glm_jax.serve.server import Server, ServerConfig, bound_socket, create_app
from glm_jax.serve.service import Service, ServiceConfig

WORKDIR = flags.DEFINE_string(
    "workdir", None, "The work directory of a run, or a Hugging Face folder with a tokenizer.json."
)
CORS_ORIGINS = flags.DEFINE_list(
    "cors_origins",
    [],
    "The origins of web pages that may use the server, as http://localhost:3000; * allows all.",
)
HEAD_SECONDS = flags.DEFINE_float(
    "head_seconds",
    15.0,
    "The time a client has to send a request's head, in seconds.",
    lower_bound=0.1,
)
HOST = flags.DEFINE_string(
    "host", "127.0.0.1", "The address to listen on; 0.0.0.0 means all addresses of this machine."
)
PORT = flags.DEFINE_integer(
    "port", 8000, "The port to listen on; 0 takes any free port.", lower_bound=0, upper_bound=65535
)
MODEL_NAME = flags.DEFINE_string("model_name", "glm", "The name by which requests call the model.")
API_KEY_FILE = flags.DEFINE_string(
    "api_key_file",
    None,
    "The file with the key that requests must show; without it no key is required.",
)
CONTEXT = flags.DEFINE_integer(
    "context",
    0,
    "The maximum number of tokens of a request, prompt and answer; 0 means the model's maximum.",
    lower_bound=0,
)
NUM_ROWS = flags.DEFINE_integer(
    "num_rows",
    8,
    "The number of batch slots, which is how many requests are decoded at a time.",
    lower_bound=1,
)
PAGE_SIZE = flags.DEFINE_integer(
    "page_size", 16, "The number of tokens in a page of the cache.", lower_bound=1
)
NUM_PAGES = flags.DEFINE_integer(
    "num_pages",
    0,
    "The number of pages of the cache; 0 means enough for every slot to fill its context.",
    lower_bound=0,
)
PREFILL_CHUNK = flags.DEFINE_integer(
    "prefill_chunk",
    256,
    "The maximum number of prompt tokens of a request in one call.",
    lower_bound=1,
)
DECODE_STEPS = flags.DEFINE_integer(
    "decode_steps", 8, "The number of tokens sampled between two looks at the queue.", lower_bound=1
)
DRAFT_TOKENS = flags.DEFINE_integer(
    "draft_tokens",
    0,
    "The number of tokens that the MTP block drafts; 0 turns speculative decoding off.",
    lower_bound=0,
)
WEIGHTS = flags.DEFINE_string(
    "weights", "compute", "The format of the weights: compute precision, fp8 or int8."
)
CACHE_DTYPE = flags.DEFINE_string(
    "cache_dtype",
    "compute",
    "The type of cached keys and values: compute precision, float32, bfloat16 or float8_e4m3fn.",
)
QUEUE_LIMIT = flags.DEFINE_integer(
    "queue_limit", 256, "The number of requests that may wait; further ones get 429.", lower_bound=0
)
REQUEST_SECONDS = flags.DEFINE_float(
    "request_seconds", 600.0, "The time limit of a request, waiting included, in seconds."
)
MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens",
    0,
    "The maximum number of new tokens of a request; 0 means what the context leaves.",
    lower_bound=0,
)
MAX_BODY_BYTES = flags.DEFINE_integer(
    "max_body_bytes", 2**20, "The maximum size of a request's body, in bytes.", lower_bound=1
)
MAX_REQUESTS = flags.DEFINE_integer(
    "max_requests",
    512,
    "The number of HTTP requests in work at a time; further ones get 503.",
    lower_bound=1,
)
DRAIN_SECONDS = flags.DEFINE_float(
    "drain_seconds", 30.0, "The time that running requests have to finish at shutdown, in seconds."
)


def engine_config(max_length: int) -> EngineConfig:
    """The engine's sizes by the flags. max_length: of the model."""
    context = CONTEXT.value or max_length
    pages_a_row = -(-(context + DRAFT_TOKENS.value) // PAGE_SIZE.value)
    return EngineConfig(
        context=context, num_rows=NUM_ROWS.value, page_size=PAGE_SIZE.value,
        num_pages=NUM_PAGES.value or NUM_ROWS.value * pages_a_row,
        prefill_chunk=PREFILL_CHUNK.value, min_rows=1, min_chunk=1,
        decode_steps=DECODE_STEPS.value, draft_tokens=DRAFT_TOKENS.value, weights=WEIGHTS.value,
        cache_dtype=CACHE_DTYPE.value, keep_experts=False,
    )  # fmt: skip


def read_key(path: str | None) -> str | None:
    if path is None:
        return None
    with open(path, encoding="utf-8") as file:
        return file.read().strip()


def allow_many_connections():
    """Each is an open file, and the usual soft limit of 1,024 is for programs that use select()."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, limit), hard))


def main():
    # What can be wrong is looked at before a large model is loaded.
    key, bound = read_key(API_KEY_FILE.value), bound_socket(HOST.value, PORT.value)
    service_config = ServiceConfig(QUEUE_LIMIT.value, REQUEST_SECONDS.value)
    model, tokenizer = load(entry.given(WORKDIR))
    if tokenizer is None:
        raise ValueError(f"{WORKDIR.value} has no tokenizer.json")
    sizes = engine_config(model.config.max_length)
    config = ServerConfig(
        model_name=MODEL_NAME.value, api_key=key,
        max_new_tokens=MAX_NEW_TOKENS.value or sizes.context,
        max_body_bytes=MAX_BODY_BYTES.value, max_requests=MAX_REQUESTS.value,
        cors_origins=tuple(CORS_ORIGINS.value),
    )  # fmt: skip
    service = Service(Engine(model, sizes, decode_text=tokenizer.decode), service_config)
    allow_many_connections()
    # The server raises the signal again once it has drained: it has been answered then.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    ready = f"serving {MODEL_NAME.value!r} from {WORKDIR.value} at %s/v1"
    app = create_app(service, tokenizer, config)
    Server(
        app, service, bound, DRAIN_SECONDS.value,
        lambda address: print(ready % address, flush=True), head_seconds=HEAD_SECONDS.value
    ).run()  # fmt: skip


if __name__ == "__main__":
    flags.mark_flags_as_required(["workdir"])
    entry.run(main)
