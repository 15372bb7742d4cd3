"""Find damage in checkpoints, choose the one to resume from, and explain why one cannot be written."""

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from zipfile import ZipFile

from safetensors import SafetensorError, safe_open

logger = logging.getLogger(__name__)

STATE = "trainer_state.json"  # the Trainer writes it last: a run killed while it saved leaves none, or half of one
SETTINGS = ("config.json", "adapter_config.json", "*.safetensors.index.json")
WEIGHTS = ("*.safetensors", "*model*.bin", "*.distcp", "*model_states.pt")
# A checkpoint that goes on exactly has all of these; one with the weights alone (`save_only_model`) none of them.
PARTS = {
    "optimizer.pt": ("optimizer*", "rank*-optimizer.pt", "global_step*"),
    "scheduler.pt": ("scheduler.*", "custom_checkpoint_*.pkl", "global_step*"),
    "rng_state.pth": ("rng_state*.pth", "random_states_*.pkl"),
}
PICKLES = ("optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state*.pth", "pytorch_model*.bin")
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
TORCH_COULD_NOT_WRITE = re.compile("iostream error|PytorchStreamWriter|unexpected pos")  # torch.save keeps no errno
OPTION = "resume_from_checkpoint={!r}"  # how a checkpoint is named to the Trainer


class CheckpointError(OSError):
    """A checkpoint or the model could not be written: the disk is full, or the file system refuses."""


# ---- Reading ----


def is_finished(checkpoint: Path) -> bool:
    """Tell whether a checkpoint was written to its end."""
    try:
        state = json.loads((checkpoint / STATE).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(state, dict) and "global_step" in state


def find_damage(checkpoint: Path) -> str | None:
    """Say what is wrong with a checkpoint; None when it is whole.

    Looks for unfinished, missing, truncated and garbled files, by the headers of the weights and the checksums of
    `torch.save`; nothing is unpickled. Weights changed in their middle are not noticed: safetensors has no checksums.
    Sharded weights, adapters, checkpoints of several processes (DDP, FSDP, DeepSpeed) and of weights alone are whole.
    """
    if not checkpoint.is_dir():
        return "there is no such folder"
    if not is_finished(checkpoint):
        return f"{STATE}, which is written last, is {'garbled' if (checkpoint / STATE).exists() else 'missing'}"
    for file in _find(checkpoint, SETTINGS):
        try:
            settings = json.loads(file.read_text("utf-8"))
            missing = [name for name in settings.get("weight_map", {}).values() if not (checkpoint / name).is_file()]
        except (ValueError, AttributeError, TypeError):
            return f"{file.name} is truncated or garbled"
        if missing:
            return f"{missing[0]} is missing"
    if not any(next(checkpoint.rglob(pattern), None) for pattern in WEIGHTS):
        return "model.safetensors is missing"
    for file in sorted(checkpoint.rglob("*.safetensors")):
        try:
            with safe_open(file, "pt"):  # checks the header, and the length against it
                pass
        except (SafetensorError, OSError) as error:
            return f"{file.relative_to(checkpoint)} is truncated or garbled ({error})"
    missing = [name for name, patterns in PARTS.items() if not _find(checkpoint, patterns)]
    if missing and len(missing) < len(PARTS):
        return f"{missing[0]} is missing"
    for file in _find(checkpoint, PICKLES):
        try:
            with ZipFile(file) as parts:
                sound = parts.testzip() is None
        except Exception:  # bytes that mean nothing raise anything
            sound = False
        if not sound:
            return f"{file.name} is truncated or garbled"
    return None


def _find(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted({path for pattern in patterns for path in folder.glob(pattern)})


def list_checkpoints(folder: Path) -> list[Path]:
    """List the folders `checkpoint-*`, unfinished ones too, the newest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name[11:]), reverse=True)


def last_finished(folder: Path) -> Path | None:
    """Find the newest checkpoint that was written to its end, with a warning for newer ones that were not."""
    checkpoints = list_checkpoints(folder)
    last = next(filter(is_finished, checkpoints), None)
    for path in checkpoints[: checkpoints.index(last) if last else None]:
        logger.warning(f"{path} is passed over, as it is unfinished: {find_damage(path)}.")
    return last


def check_checkpoint(checkpoint: Path, option: str = OPTION) -> None:
    """Refuse a damaged checkpoint before anything is done with it.

    `option` is a format of one place, by which the message names another checkpoint to the program.

    Raises:
        ValueError: with the damage, and the newest whole checkpoint beside it.
    """
    if (damage := find_damage(checkpoint)) is None:
        return
    others = (path for path in list_checkpoints(checkpoint.parent) if path.resolve() != checkpoint.resolve())
    other = next((path for path in others if find_damage(path) is None), None)
    advice = "No checkpoint beside it is whole: start anew in another folder."
    if other is not None:
        advice = f"The newest whole one beside it is {other.name}: go on from there with {option.format(str(other))}."
    state = "is damaged" if is_finished(checkpoint) else "is no complete checkpoint"
    raise ValueError(f"{checkpoint} {state}: {damage}. Nothing was started or changed. {advice}")


def checkpoint_to_resume(resume: bool | str | None, folder: Path, option: str = OPTION) -> str | None:
    """Find the checkpoint to resume from, and refuse a damaged one.

    Args:
        resume: its folder; True for the newest one in `folder` that was written to its end; None or False for none.
        folder: the output folder of the run.
        option: as for `check_checkpoint`.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    if not resume:
        return None
    if resume is True:
        if (last := last_finished(folder)) is None:
            newest = next(iter(list_checkpoints(folder)), None)
            found = "" if newest is None else f" ({newest.name} is unfinished: {find_damage(newest)})"
            raise ValueError(
                f"{option.format(True)}: {folder} holds no complete checkpoint{found}. Start anew in another output "
                "folder, or name the folder of a checkpoint."
            )
        resume = str(last)
    check_checkpoint(Path(resume), option)
    return resume


# ---- Writing ----


@contextmanager
def saving(checkpoint: Path, option: str = OPTION, *, writer: bool = True) -> Iterator[None]:
    """Write a checkpoint in the `with` block, and remove it again if it cannot be written.

    Args:
        checkpoint: folder, there or not; while it is written it counts as unfinished.
        option: as for `check_checkpoint`.
        writer: whether this process is the one that finishes it.

    Raises:
        CheckpointError: the disk is full; with the checkpoint to resume from.
    """
    if writer:
        (checkpoint / STATE).unlink(missing_ok=True)
    try:
        yield
    except Exception as error:
        if (reason := why_not_written(error, checkpoint.parent)) is None:
            raise
        if writer and not is_finished(checkpoint):
            shutil.rmtree(checkpoint, ignore_errors=True)  # it has no use, and takes room
        go_on = how_to_go_on(checkpoint.parent, option)
        raise CheckpointError(f"{checkpoint} could not be saved: {reason}. {go_on}") from error


def how_to_go_on(folder: Path, option: str = OPTION) -> str:
    """Name the last whole checkpoint in a folder, and the argument that resumes from it."""
    last = next((path for path in list_checkpoints(folder) if find_damage(path) is None), None)
    if last is None:
        return "There is no checkpoint to go on from: make room, and start anew in another folder."
    return f"The last whole checkpoint is {last.name}: make room, and go on with {option.format(str(last))}."


def why_not_written(error: BaseException, folder: Path) -> str | None:
    """Say why a file could not be written; None for an error of another kind."""
    seen: BaseException | None = error
    while seen is not None:
        reason = None
        if isinstance(seen, OSError) and seen.errno in NO_ROOM:
            reason = os.strerror(seen.errno)
        elif isinstance(seen, SafetensorError) and (match := re.search(r"I/O error: (.*) \(os error", str(seen))):
            reason = match[1]
        elif isinstance(seen, RuntimeError) and TORCH_COULD_NOT_WRITE.search(str(seen)):
            reason = "a file could not be written to its end, as on a full disk"
        if reason is not None:
            there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
            return f"{reason} ({shutil.disk_usage(there).free / 2**20:.1f} MiB are free in {there})"
        seen = seen.__cause__ or seen.__context__
    return None
