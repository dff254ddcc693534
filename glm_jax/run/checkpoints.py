"""Checkpoints of a run: state, progress and arrays beside it, asynchronous and atomic (Orbax).

A step's folder appears under its final name only when everything in it is written, so a kill at any
moment leaves the previous checkpoint as the newest.
"""

from __future__ import annotations

import functools
import json
import logging
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

logger = logging.getLogger(__name__)
_Read = TypeVar("_Read")
ARRAYS = "saved_arrays"  # in the progress: their names


class Checkpoints:
    """checkpoints/<step>/ of a work directory; `step` is the number of steps that the state has
    after it.

    Folders of steps that are not finished are set aside as <step>.unfinished: they count neither as
    the newest nor among those kept.
    """

    def __init__(
        self,
        workdir: str | pathlib.Path,
        *,
        keep: int,
        merge: Callable[[list[dict]], dict] = lambda states: states[0],
    ):
        """merge: makes one progress of all processes' own."""
        self.merge = merge
        self.folder = pathlib.Path(workdir).absolute() / "checkpoints"
        if jax.process_index() == 0:
            for unfinished in sorted(_step_folders(workdir) - _finished_folders(workdir)):
                unfinished.replace(_unused(unfinished.with_name(f"{unfinished.name}.unfinished")))
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, cleanup_tmp_directories=True, enable_async_checkpointing=True
        )
        self.manager = ocp.CheckpointManager(
            self.folder, options=options, item_names=("state", "data", "arrays")
        )

    def latest(self) -> int | None:
        """Step of the newest finished checkpoint."""
        return max(finished_steps(self.folder.parent), default=None)

    def save(
        self, step: int, state, progress: dict, arrays: Mapping[str, np.ndarray] | None = None
    ):
        """Starts writing and returns; the arrays may be donated at once. progress: this process's
        own part, as JSON has it. arrays: of the host, beside it.

        Raises OSError, naming the folder, where this or the save before it cannot be written.
        """
        # An array of no elements has no chunk that could be written.
        filled = {name: x for name, x in (arrays or {}).items() if x.size}
        merged = self.merge(_all_processes(progress)) | {ARRAYS: sorted(filled)}
        items = {"state": ocp.args.StandardSave(state), "data": ocp.args.JsonSave(merged)}
        if filled:
            items["arrays"] = ocp.args.StandardSave(filled)
        args = ocp.args.Composite(**items)
        self._writing(lambda: self.manager.save(step, args=args, force=True))

    def save_weights(self, step: int, params, router):
        """Writes a checkpoint that holds weights alone, as an import has them."""
        args = ocp.args.Composite(state=ocp.args.StandardSave({"params": params, "router": router}))
        self._writing(lambda: self.manager.save(step, args=args, force=True))

    def restore(self, step: int, abstract_state) -> tuple[Any, dict, dict[str, np.ndarray]]:
        """State with the shardings of abstract_state, the progress that was saved with it, and the
        arrays, but for those of no elements.
        """
        folder = self.folder / str(step)
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract_state), data=ocp.args.JsonRestore()
        )
        restored = reading(folder, lambda: self.manager.restore(step, args=args))
        progress, arrays = dict(restored["data"]), {}
        if names := progress.pop(ARRAYS, []):
            marks = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
            args = ocp.args.PyTreeRestore(item=dict.fromkeys(names, 0), restore_args=marks)
            with ocp.PyTreeCheckpointer() as reader:
                arrays = reading(folder, lambda: reader.restore(folder / "arrays", args=args))
        return restored["state"], progress, arrays

    def wait(self):
        """Until what was saved is on disk; raises OSError, naming the folder, where it cannot be
        written.
        """
        self._writing(self.manager.wait_until_finished)

    def written(self) -> int | None:
        """Step of the newest checkpoint, once what is being saved is on disk."""
        self.wait()
        return self.latest()

    def preempted(self, step: int) -> bool:
        """Whether any process has been told to stop; all processes agree on the step."""
        return self.manager.reached_preemption(step)

    def close(self):
        """Ends what runs in the background; a failure of it was raised by `save` or `wait`, or
        another error ends the run.
        """
        try:
            self.manager.close()
        except (OSError, ValueError, RuntimeError) as error:
            logger.warning("closing %s: %s", self.folder, _first_line(error))

    def _writing(self, write: Callable[[], object]):
        try:
            write()
        except (OSError, ValueError, RuntimeError) as error:  # tensorstore's errors are ValueErrors
            raise OSError(
                f"cannot write a checkpoint to {self.folder}: {_first_line(error)}"
            ) from error


def reading(folder: pathlib.Path, read: Callable[[], _Read]) -> _Read:
    try:
        return read()
    except Exception as error:  # Orbax raises bare Exception for an array that it cannot read
        older = [step for step in finished_steps(folder.parent.parent) if step != int(folder.name)]
        others = (
            f"; there are also those of the steps {', '.join(map(str, older))}" if older else ""
        )
        raise ValueError(
            f"checkpoint {folder} does not fit this config or is damaged:"
            f" {_first_line(error.__cause__ or error)}{others}"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:600]


def _all_processes(state: dict) -> list[dict]:
    """Every process's state, on every process."""
    if jax.process_count() == 1:
        return [state]
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(text.size))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: text.size] = text
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def read_config(workdir: str | pathlib.Path) -> dict:
    """config.json of a work directory. Raises ValueError where there is none."""
    path = pathlib.Path(workdir) / "config.json"
    if not path.is_file():
        raise ValueError(f"{workdir} is no work directory of a run: it has no config.json")
    return json.loads(path.read_text())


def finished_steps(workdir: str | pathlib.Path) -> list[int]:
    """Steps of the finished checkpoints, in order. Those that are not are passed over, with a
    warning that names them.
    """
    finished = _finished_folders(workdir)
    for folder in sorted(_step_folders(workdir) - finished):
        _warn_of(folder)
    return sorted(int(folder.name) for folder in finished)


def _step_folders(workdir: str | pathlib.Path) -> set[pathlib.Path]:
    return {
        p for p in (pathlib.Path(workdir).absolute() / "checkpoints").glob("*") if p.name.isdigit()
    }


def _finished_folders(workdir: str | pathlib.Path) -> set[pathlib.Path]:
    """Those to which Orbax has written everything: its own mark of the folder, and the metadata of
    the state's arrays.
    """
    marks = ("_CHECKPOINT_METADATA", "state/_METADATA")
    return {
        folder
        for folder in _step_folders(workdir)
        if all((folder / mark).is_file() for mark in marks)
    }


@functools.cache  # once a process
def _warn_of(folder: pathlib.Path):
    logger.warning("checkpoint %s is not finished: it is passed over", folder)


def _unused(path: pathlib.Path) -> pathlib.Path:
    return next(
        p for i in range(10**6) if not (p := path.with_name(path.name + f".{i}" * (i > 0))).exists()
    )


def newest_step(workdir: str | pathlib.Path) -> int:
    """Newest finished checkpoint. Raises ValueError where there is none."""
    steps = finished_steps(workdir)
    if not steps:
        raise ValueError(f"{workdir} holds no finished checkpoint")
    return max(steps)
