"""The work directory of a run: its config, tokenizer, checkpoints and metrics, and the signal that
stops it. Shared by all loops.
"""

from __future__ import annotations

import functools
import json
import pathlib
import signal
from collections.abc import Callable, Collection, Mapping, Sequence

import jax
import numpy as np

from data.tokenizer import Tokenizer
from glm_jax.files import write_text
from glm_jax.run.checkpoints import Checkpoints, finished_steps
from glm_jax.run.recorder import Recorder, check_finite


class WorkDir:
    """Reads when it is made, and raises ValueError for a config that does not resume the run there;
    writes from `begin` on.

    fixed: sections of the config that a resumed run may not change, but for the keys (section, key)
    of changeable. keep: checkpoints. merge: makes one progress of all processes' own.
    """

    def __init__(
        self,
        path: pathlib.Path,
        config_json: str,
        *,
        fixed: Sequence[str],
        changeable: Collection[tuple[str, str]],
        keep: int,
        merge: Callable[[list[dict]], dict] = lambda states: states[0],
    ):
        check_config(path, config_json, fixed, changeable)
        self.path, self.config_json = path, config_json
        self.resuming = bool(finished_steps(path))
        self.is_main = jax.process_index() == 0
        self._keep, self._merge = keep, merge
        self._recorder: Recorder | None = None
        self._stop: Stop | None = None

    @functools.cached_property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.path, keep=self._keep, merge=self._merge)

    def begin(self, tokenizer: Tokenizer):
        """Writes config.json and tokenizer.json; the first process does."""
        if not self.is_main:
            return
        write_text(self.path / "config.json", self.config_json)
        write_text(self.path / "tokenizer.json", tokenizer.to_json())

    def start(self, first: int):
        """From here on steps are recorded, the first of them `first`, and signals stop the run."""
        self._recorder = Recorder(self.path, first) if self.is_main else None
        self._stop = Stop()

    def record(self, record: Mapping):
        if self._recorder:
            self._recorder.write(record)

    def record_text(self, step: int, name: str, text: str):
        if self._recorder:
            self._recorder.text(step, name, text)

    def should_stop(self, step: int) -> bool:
        """Whether to save after `step` steps and return; the same on all processes."""
        if jax.process_count() > 1:
            return self.checkpoints.preempted(step)
        return self._stop is not None and self._stop.requested

    def check_finite(
        self, metrics: Mapping, *, step: int, batch: Callable[[], Mapping[str, np.ndarray]]
    ):
        """As recorder.check_finite, for this run's checkpoints."""
        good = self.checkpoints.written
        check_finite(metrics, step=step, workdir=self.path, batch=batch, good=good)

    def close(self):
        if self._stop:
            self._stop.restore_handlers()
        self.checkpoints.close()
        if self._recorder:
            self._recorder.close()


class Stop:
    """Requested by SIGTERM or SIGINT. Of several processes any may get the signal; they ask
    Checkpoints.preempted.
    """

    def __init__(self):
        self.requested = False
        if jax.process_count() == 1:
            handlers = dict.fromkeys((signal.SIGTERM, signal.SIGINT), self._on_signal)
        else:  # jax.distributed has a handler of SIGTERM, from which the processes learn of it
            handlers = {signal.SIGINT: lambda *_: signal.raise_signal(signal.SIGTERM)}
        self.previous = {s: signal.signal(s, handler) for s, handler in handlers.items()}

    def _on_signal(self, *_):
        self.requested = True

    def restore_handlers(self):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def check_config(
    workdir: pathlib.Path,
    config_json: str,
    fixed: Sequence[str],
    changeable: Collection[tuple[str, str]],
):
    """Raises ValueError where the run in workdir has another value in a section of `fixed`, or
    another seed.
    """
    path = workdir / "config.json"
    if not path.exists():
        return
    old, new = json.loads(path.read_text()), json.loads(config_json)
    if old.keys() != new.keys():
        raise ValueError(
            f"{workdir} holds a run of another kind: its config.json has {', '.join(old)}; use"
            " another --workdir"
        )
    keys = [
        (section, key)
        for section in fixed
        for key in sorted(old[section].keys() | new[section].keys())
    ]
    for section, key in [*keys, ("loop", "seed")]:
        before, now = old[section].get(key), new[section].get(key)
        if before != now and (section, key) not in changeable:
            raise ValueError(
                f"{workdir} was started with {section}.{key}={before!r}, not {now!r}; use another"
                " --workdir"
            )
