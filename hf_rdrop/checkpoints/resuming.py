"""Resume a run exactly: with its order of the data, its logs, and whole checkpoints."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.utils.data import Sampler
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler

from .integrity import OPTION, checkpoint_to_resume, saving

if TYPE_CHECKING:
    _AnyTrainer = Trainer
else:
    _AnyTrainer = object  # a mixin, which derives from no Trainer

SUMS = "RDropLossLog"  # where trainer_state.json keeps the sums since the last log line


class KeptLog(Protocol):
    """Sums since the last log line, which a checkpoint keeps."""

    def state(self, gather: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
        """Return the sums, as means over all processes, in a form for JSON."""


class EpochSeededSampler(Sampler):
    """Group by length in an order that seed and epoch alone decide.

    Trainer's own order comes from the global generator: it depends on the random numbers that dropout has drawn,
    differs between ranks, and changes when a run is resumed within an epoch.
    """

    def __init__(self, grouped: LengthGroupedSampler, seed: int) -> None:
        self.grouped, self.seed, self.epoch = grouped, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.grouped)

    def __iter__(self) -> Iterator[int]:
        self.grouped.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(self.grouped)


class ResumeMixin(_AnyTrainer):
    """Let a `Trainer` resume exactly, also in the middle of an epoch or of a log interval.

    Raises:
        ValueError: the checkpoint to resume from is damaged; with the newest whole one beside it.
        CheckpointError: a checkpoint cannot be written (the disk is full); with the last whole one.
    """

    resume_option = OPTION  # how messages name a checkpoint to go on from
    _kept: KeptLog | None = None
    _loading: str | None = None  # the checkpoint whose weights are being read

    def keep(self, log: KeptLog) -> None:
        """Save `log.state(...)` in every checkpoint from now on; `restore_sums` gives it back."""
        self._kept = log

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train as the base class does; `True` takes the newest checkpoint that was written to its end."""
        folder = Path(str(self.args.output_dir))
        resume_from_checkpoint = checkpoint_to_resume(resume_from_checkpoint, folder, self.resume_option)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        self._loading = resume_from_checkpoint
        super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)

    def _load_best_model(self) -> None:
        self._loading = self.state.best_model_checkpoint
        super()._load_best_model()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Load weights under other names as `from_pretrained` does, or refuse them; Trainer only warns of them.

        (transformers 5.23 writes ViT, AST and others under earlier releases' names, which its Trainer does not read.)
        """
        missing, unexpected = load_result.missing_keys, load_result.unexpected_keys
        if not (missing and unexpected):
            super()._issue_warnings_after_load(load_result)
            return
        model: Any = self.model
        if self._loading is not None and hasattr(model, "from_pretrained"):
            with torch.random.fork_rng():
                found, told = type(model).from_pretrained(self._loading, output_loading_info=True)
            if not told["missing_keys"] and not told["unexpected_keys"]:
                model.load_state_dict(found.state_dict())
                return
        raise ValueError(
            f"the checkpoint's weights have other names than the model's (it has {unexpected[0]}, but no "
            f"{missing[0]}), so {len(missing)} of them would start fresh. It is of another model, or was saved by "
            "transformers before 5.6, which cannot resume BERT: update transformers and start anew."
        )

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        sampler = super()._get_train_sampler(*args, **kwargs)
        seed = self.args.data_seed
        if isinstance(sampler, LengthGroupedSampler) and sampler.generator is None:
            return EpochSeededSampler(sampler, self.args.seed if seed is None else seed)
        return sampler

    def _save_checkpoint(self, model: Any, trial: Any, *args: Any, **kwargs: Any) -> None:
        gather, step = self.accelerator.gather, self.state.global_step
        states: Any = self.state.stateful_callbacks
        kept = {} if self._kept is None else self._kept.state(gather)
        loss = gather(self._tr_loss[None]).mean().item()
        states[SUMS] = {**kept, "trainer_loss": loss, "step": step, "logged": self._globalstep_last_logged}
        checkpoint = Path(self._get_output_dir(trial=trial), f"checkpoint-{step}")
        with saving(checkpoint, self.resume_option, writer=self.args.should_save):
            super()._save_checkpoint(model, trial, *args, **kwargs)

    def _load_callback_state(self) -> None:
        states: Any = self.state.stateful_callbacks
        sums = states.pop(SUMS, None)  # no callback, of which the base class would warn that it is missing
        super()._load_callback_state()
        if sums is not None:
            states[SUMS] = sums

    def restore_sums(self) -> dict[str, Any] | None:
        """Put Trainer's sums of losses back when training begins, and return those of the log that was kept.

        Returns None unless the run resumes from a checkpoint.
        """
        states: Any = self.state.stateful_callbacks
        sums = states.get(SUMS)
        if not sums or sums["step"] != self.state.global_step:
            return None
        self._tr_loss += sums["trainer_loss"]
        self._total_loss_scalar -= sums["trainer_loss"]  # `train_loss` is of the steps of this call
        self._globalstep_last_logged = sums["logged"]
        return sums


def set_epoch(dataloader: Any, epoch: int) -> None:
    """Tell every sampler its epoch: resuming within one, accelerate does not hand it through to each kind."""
    sampler = getattr(dataloader, "batch_sampler", None)
    while sampler is not None:
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        sampler = getattr(sampler, "batch_sampler", None) or getattr(sampler, "sampler", None)
