"""Train a tiny model for one optimizer step, and record what its forwards and its gradients were."""

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from hf_rdrop import RDropTrainer, RDropTrainingArguments

from .batches import ROWS, Rows, stack

ALPHA = 4.0


@dataclass
class Step:
    """What one optimizer step was.

    Args:
        log: the Trainer's log line.
        forwards: of each batch, what the model was called with and what it returned.
        gradients: by the parameters' names, as the optimizer would have taken them.
    """

    log: dict[str, float] = field(default_factory=dict)
    forwards: list[tuple[dict[str, Any], Any]] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)


class _Watch(TrainerCallback):
    """Keeps the last forward of each batch, and the gradients of the step."""

    def __init__(self, model: nn.Module, step: Step) -> None:
        self.model, self.step, self.last = model, step, None
        model.register_forward_hook(self.record, with_kwargs=True)

    def record(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if torch.is_grad_enabled():
            inputs = {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in kwargs.items()}
            self.last = inputs, output

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        self.step.forwards.append(self.last)

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.step.forwards.append(self.last)
        named = self.model.named_parameters()
        self.step.gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}


def train(
    model: nn.Module, rows: Rows, *, batches: int = 1, plain: bool = False, seed: int = 0, **arguments: Any
) -> Step:
    """Train a copy of the model for one step over all rows; nothing is learned, so that steps can be compared.

    Args:
        model: the model; not changed.
        rows: of the step.
        batches: over how many batches they are divided.
        plain: whether Transformers' own Trainer trains.
        arguments: more of the training arguments.
    """
    model = copy.deepcopy(model)
    step = Step()
    watch = _Watch(model, step)
    kind, trainer_class = (TrainingArguments, Trainer) if plain else (RDropTrainingArguments, RDropTrainer)
    with tempfile.TemporaryDirectory() as folder:
        common: dict[str, Any] = {
            "output_dir": folder,
            "max_steps": 1,
            "logging_steps": 1,
            "learning_rate": 0.0,
            "optim": "sgd",
            "max_grad_norm": 0.0,
            "per_device_train_batch_size": ROWS // batches,
            "gradient_accumulation_steps": batches,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "remove_unused_columns": False,
            "logging_nan_inf_filter": False,
            "log_level": "error",
            "seed": seed,
        }
        args = kind(**common, **arguments)
        trainer = trainer_class(model=model, args=args, train_dataset=rows, data_collator=stack, callbacks=[watch])
        trainer.remove_callback(PrinterCallback)
        trainer._get_train_sampler = lambda *a, **k: torch.utils.data.SequentialSampler(rows)  # rows keep their batch
        set_seed(seed)
        trainer.train()
    step.log = next((line for line in trainer.state.log_history if "loss" in line), {})
    return step


def without_other_noise(model: nn.Module) -> nn.Module:
    """Copy a model without what is random beside its dropout rates: skipped layers, masked spans, jitter."""
    model = copy.deepcopy(model)
    owners = [model, *model.modules()]
    owners += [config for owner in owners if (config := getattr(owner, "config", None)) is not None]
    for owner in owners:
        for name, value in _NOISE.items():
            if isinstance(getattr(owner, name, None), (bool, int, float)):
                setattr(owner, name, value)
    return model


_NOISE = {
    "drop_prob": 0.0,
    "layerdrop": 0.0,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "apply_spec_augment": False,
    "router_jitter_noise": 0.0,
    "input_jitter_noise": 0.0,
    "jitter_noise": 0.0,
}


def differs_between_passes(model: nn.Module, batch: dict[str, Tensor], scores: Callable[[Any], Tensor | None]) -> bool:
    """Measure whether two passes of a batch differ in training, whatever the model says of its dropout."""
    model = copy.deepcopy(model).train()
    config: Any = model.config.get_text_config()
    config.use_cache = False  # as the Trainer has it
    set_seed(1)
    with torch.no_grad():
        first, second = (scores(model(**batch)) for _ in range(2))
    return first is not None and second is not None and not torch.equal(first, second)
