"""Save a checkpoint and end when a scheduler sends SIGTERM."""

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
    """On SIGTERM, finish the optimizer step, save a checkpoint, and end the process with status 143.

    A run that resumes from that checkpoint equals the uninterrupted one. Further SIGTERMs are ignored meanwhile.
    Several processes exchange one number per step, so that all stop after the same step. With `save_strategy="no"`
    SIGTERM is left as it is. (Trainer's own `enable_jit_checkpoint` saves in the middle of a step, which a resumed run
    trains with other dropout masks.)

    Args:
        option: format of one place, by which the message names the checkpoint to resume from.

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
        """Restore the earlier handler of SIGTERM, as after an exception in training."""
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
            self._previous = None


def _any_process(flag: bool, args: Any) -> bool:
    if args.world_size == 1:
        return flag
    flags = torch.tensor(int(flag), device=args.device)
    distributed.all_reduce(flags, distributed.ReduceOp.MAX)
    return bool(flags)
