"""What makes the second pass cheaper in a training run: the shared trunk and the fused head."""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..cost.model_shape import describe_model
from ..cost.predict import predict_cost
from ..fused.head import FusedHead, choose_fused_head
from ..objective.heads import find_logits
from ..objective.parent_loss import check_labels_of_head
from ..trunk.check import check_shared_trunk
from ..trunk.shared import SharedTrunk

if TYPE_CHECKING:
    from ..trainer import RDropMixin

logger = logging.getLogger(__name__)


class Economies:
    """The economies of one training run, set up when it begins and tried out on its first batch.

    Args:
        trainer: the trainer, whose arguments ask for them.

    Attributes:
        trunk: the shared lower layers, None when nothing is shared.
        fused_head: the head that computes the loss itself, None when the full logits are used. Known after `try_out`.
        tried_out, compared: whether the first batch, and the first logits of several passes, have been looked at.

    Raises:
        ValueError: when the model's layers cannot be shared.
    """

    def __init__(self, trainer: "RDropMixin") -> None:
        self.trainer = trainer
        self.trunk: SharedTrunk | None = None
        self.fused_head: FusedHead | None = None
        self.tried_out = self.compared = False
        if trainer.rdrop_argument("alpha") and (shared := trainer.rdrop_argument("shared_layers")):
            self.trunk = SharedTrunk(trainer.base_model, shared, non_batch_inputs=trainer.non_batch_inputs)

    def try_out(self, model: nn.Module, inputs: Mapping[str, Any], labels: Tensor | None) -> None:
        """Check on the rows of the first batch that labels are right and every economy does what it should.

        Args:
            model: the model as training calls it.
            inputs: the batch, not repeated.
            labels: its labels.

        Raises:
            ValueError: when a label is no class of the model, or when the model does not work with its layers shared
                or with the fused head asked for.
        """
        self.tried_out, trainer = True, self.trainer
        if labels is not None:
            check_labels_of_head(trainer.base_model, labels)
        model = getattr(model, "_orig_mod", model)  # nothing is compiled for the sake of a check
        if self.trunk is not None:
            passes = trainer.rdrop_argument("passes")
            repeated = trainer.repeat(inputs, passes)
            given: Any = trainer.logits_for_agreement
            check_shared_trunk(
                self.trunk,
                model,
                repeated,
                passes,
                batch_size=trainer._batch_size(inputs),
                logits_of=find_logits if given is None else lambda outputs, _, plain: _first(given(outputs, plain)),
            )
        self.fused_head = choose_fused_head(
            trainer.rdrop_argument("fused_head"),
            trainer.base_model,
            model,
            inputs,
            labels,
            shift_labels=trainer.shifts_labels,
            obstacle=trainer.needs_outputs,
        )
        torch.clear_autocast_cache()  # torch before 2.8 would train on with the casts of the checks, without gradient
        if trainer.is_world_process_zero():
            logger.info(self.describe_cost(inputs))

    def describe_cost(self, inputs: Mapping[str, Any]) -> str:
        """What the cost model says of a step on this batch, in a sentence."""
        trainer, args = self.trainer, self.trainer.args
        try:
            shape = describe_model(trainer.base_model, inputs, itemsize=2 if args.bf16 or args.fp16 else None)
        except Exception as error:  # a model of an unforeseen kind must train all the same
            logger.debug("The sizes of the model cannot be read.", exc_info=error)
            shape = None
        if shape is None:
            return "R-Drop: no prediction of the cost, because the sizes of this model's layers are unknown."
        cost = predict_cost(
            shape,
            passes=trainer.rdrop_argument("passes"),
            shared_layers=0 if self.trunk is None else self.trunk.shared_layers,
            interval=trainer.rdrop_argument("interval"),
            fused_head=self.fused_head is not None,
            gradient_checkpointing=any(
                getattr(m, "gradient_checkpointing", False) for m in trainer.base_model.modules()
            ),
            gradient_accumulation_steps=args.gradient_accumulation_steps,
        )
        return (
            f"R-Drop: about {cost.time:.2f}x the time and {cost.memory:.2f}x the memory for activations and gradients "
            "of plain fine-tuning (predicted from the sizes of model and batch)."
        )

    def start(self, passes: int) -> None:
        """Before a forward over a batch repeated `passes` times; in force until `stop`."""
        if self.trunk is not None:
            self.trunk.start(passes)

    def stop(self) -> None:
        """After the backward pass, and not sooner: gradient checkpointing runs the shared layers in it once more."""
        if self.trunk is not None:
            self.trunk.stop()

    def remove(self) -> None:
        """Leave the model as it was."""
        if self.trunk is not None:
            self.trunk.remove()


def _first(given: Any) -> Any:
    """The scores of (scores, mask, ...)."""
    return given[0] if isinstance(given, tuple) else given
