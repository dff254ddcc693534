"""Where a run's numbers go (metrics.jsonl, TensorBoard), and what stops it where they are not
finite.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from tensorboardX import SummaryWriter

from glm_jax.files import naming, write_text


class NonFinite(FloatingPointError):
    """A step whose loss, gradients, update or new weights are not finite; the message names it and
    where its batch was written.
    """


# names, and what names begin with
MUST_BE_FINITE = ("loss", "grad_norm", "param_norm", "held_out_loss", "grad_rms/", "update_rms/")


def check_finite(
    metrics: Mapping,
    *,
    step: int,
    workdir: pathlib.Path,
    batch: Callable[[], Mapping[str, np.ndarray]],
    good: Callable,
):
    """Raises NonFinite where a metric of MUST_BE_FINITE is not; to be called before the step's
    weights are used or saved.

    batch: the step's, written to the work directory for whoever looks into it. good: gives the step
    of the newest checkpoint, or None.
    """
    bad = [
        name
        for name, value in metrics.items()
        if name.startswith(MUST_BE_FINITE) and not np.all(np.isfinite(value))
    ]
    if not bad:
        return
    path = workdir / f"nonfinite_step_{step}_process_{jax.process_index()}.npz"
    try:
        arrays: dict[str, Any] = dict(batch())
        np.savez(path, **arrays)
        where = f"its batch is in {path}"
    except OSError as error:  # a full disk must not hide what happened
        where = f"its batch could not be written to {path} ({error.strerror})"
    kept = (
        "there is no checkpoint yet"
        if (step_kept := good()) is None
        else f"the last good checkpoint is of step {step_kept}"
    )
    found = ", ".join(f"{name} is {float(np.asarray(metrics[name]).flat[0])}" for name in bad)
    raise NonFinite(f"{found} at step {step}; {where}; {kept}")


class Recorder:
    """Writes metrics.jsonl (one object a step) and TensorBoard events; on resume drops what lies
    past the restored step.
    """

    def __init__(self, workdir: pathlib.Path, first_step: int):
        self.path = workdir / "metrics.jsonl"
        self._drop_after(first_step)
        self.file = self.path.open("a")
        self.board = SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step)

    def _drop_after(self, first_step: int):
        if not self.path.exists():
            return
        kept = [line for line in self.path.read_text().splitlines() if _step_of(line) < first_step]
        write_text(self.path, "".join(line + "\n" for line in kept))

    def write(self, record: Mapping):
        """record: `step` and scalars or lists of numbers; each list entry becomes a TensorBoard
        curve of its own. Raises OSError.
        """
        with naming(self.path):
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
        for name, value in record.items():
            entries = (
                {name: value}
                if not isinstance(value, list)
                else {f"{name}/{i}": v for i, v in enumerate(value)}
            )
            for tag, number in entries.items():
                if isinstance(number, int | float):
                    self.board.add_scalar(tag, number, record["step"])

    def text(self, step: int, name: str, text: str):
        self.board.add_text(name, text, step)

    def close(self):
        """Never raises: what could not be written was raised by `write`, or another error ends the
        run.
        """
        for opened in (self.file, self.board):
            with contextlib.suppress(OSError):
                opened.close()


def _step_of(line: str) -> float:
    """Step of a metrics line; infinity for one that a kill cut short."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")


def read_metrics(workdir: str | pathlib.Path) -> list[dict]:
    """All finished lines of metrics.jsonl, oldest first."""
    lines = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if _step_of(line) != float("inf")]
