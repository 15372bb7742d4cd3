"""SIGTERM, as schedulers send it before they kill: one more checkpoint, and the end."""

import logging
import signal
import threading
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback

from .checkpoints.integrity import OPTION

logger = logging.getLogger(__name__)
STATUS = 128 + signal.SIGTERM  # as of a process that the signal itself has ended


class SaveOnSigterm(TrainerCallback):
    """On SIGTERM, finishes the optimizer step, saves a checkpoint, and ends the process with status 143.

    A run that resumes from that checkpoint is the uninterrupted one. Further SIGTERMs are ignored meanwhile: launchers
    send several. With several processes, which get the signal at different moments, all stop after the same step:
    they agree on it by one number exchanged per step. With `save_strategy="no"` SIGTERM is left as it is. (The
    Trainer's own `enable_jit_checkpoint` saves in the middle of a step, which is then trained with other dropout
    masks, and does not let processes agree.)

    Args:
        option: how the message names the checkpoint to go on from, a format of one place.

    Raises:
        SystemExit: after the checkpoint was saved, out of `trainer.train`.

    Example:
        >>> trainer = RDropTrainer(..., callbacks=[SaveOnSigterm()])
        >>> trainer.train(resume_from_checkpoint=True if any(Path("out").glob("checkpoint-*")) else None)
    """

    def __init__(self, option: str = OPTION) -> None:
        self.option, self.requested, self._stopping = option, False, False
        self._previous: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.restore()
        self.requested = self._stopping = False
        if args.save_strategy != "no" and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._request)

    def _request(self, *_: Any) -> None:
        self.requested = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.save_strategy != "no" and _any_process(self.requested, args):
            control.should_save = self._stopping = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._stopping:
            return
        if args.world_size > 1:
            distributed.barrier()  # the launcher ends all processes when one has ended
        self.restore()
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir, f"checkpoint-{state.global_step}")
            logger.warning(
                f"SIGTERM: stopped after step {state.global_step} of {state.max_steps}, with {checkpoint} saved; go "
                f"on with {self.option.format(str(checkpoint))}."
            )
        raise SystemExit(STATUS)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.restore()

    def restore(self) -> None:
        """Give SIGTERM back its earlier meaning; of use when training has ended by an exception."""
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
            self._previous = None


def _any_process(flag: bool, args: Any) -> bool:
    if args.world_size == 1:
        return flag
    flags = torch.tensor(int(flag), device=args.device)
    distributed.all_reduce(flags, distributed.ReduceOp.MAX)
    return bool(flags)
