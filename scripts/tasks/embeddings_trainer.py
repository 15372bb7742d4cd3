"""Trainer of run_contrastive.py: InfoNCE between two dropout passes of a batch of sentences (SimCSE)."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed

from finetuning.trainer import ScriptMixin
from hf_rdrop.batch import repeat_batch, split_passes
from hf_rdrop.checkpoints.resuming import ResumeMixin, set_epoch
from hf_rdrop.contrastive import POOLINGS, check_temperature, info_nce, pool
from hf_rdrop.dropout import describe_sources, inspect_dropout, is_stochastic
from hf_rdrop.hub import CleanPushMixin
from hf_rdrop.sub_models.places import embeds_with_noise
from hf_rdrop.training.checks import check_processes
from tasks.embeddings_card import EmbeddingRun, write_card

HEAD = "contrastive_head"  # the attribute of the model that holds SimCSE's MLP while it is trained


@dataclass
class ContrastiveTrainingArguments(TrainingArguments):
    """`TrainingArguments`, and what unsupervised SimCSE adds to them."""

    pooling: str = field(
        default="cls",
        metadata={
            "help": "A sentence's embedding, of the last layer: cls, its first token (SimCSE's); mean, the mean over "
            "its tokens; last, its last token (for causal models).",
            "choices": list(POOLINGS),
        },
    )
    temperature: float = field(
        default=0.05, metadata={"help": "Cosine similarities are divided by this, > 0 (SimCSE: 0.05)."}
    )
    mlp_head: bool = field(
        default=False,
        metadata={
            "help": "Train with a layer (linear, tanh) over the pooled token, as SimCSE does. Evaluation and the "
            "saved model are without it."
        },
    )
    dropout: float | None = field(
        default=None,
        metadata={"help": "Set every dropout of the model to this rate. Default: leave the model's own rates."},
    )
    # Batches of one size: the loss depends on the number of negatives, and a last batch of one row has none.
    dataloader_drop_last: bool = field(
        default=True,
        metadata={"help": "Leave out the last rows of an epoch that fill no batch (in training, not in evaluation)."},
    )

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        if self.mlp_head and self.pooling == "mean":
            raise ValueError("--mlp_head is a layer over one token: use it with --pooling cls (or last), not mean.")
        if self.label_smoothing_factor:
            raise ValueError("--label_smoothing_factor has no meaning without labels: leave it out.")
        super().__post_init__()


def add_head(model: PreTrainedModel) -> None:
    """Put SimCSE's MLP between the last layer and the loss, for training only.

    It is part of the model while that is trained (so of checkpoints, and of what several processes synchronise).
    """
    width = model.config.hidden_size
    linear = nn.Linear(width, width)
    nn.init.normal_(linear.weight, std=getattr(model.config, "initializer_range", 0.02))
    nn.init.zeros_(linear.bias)
    model.add_module(HEAD, nn.Sequential(linear, nn.Tanh()).to(model.dtype))

    def apply(module: nn.Module, args: Any, output: Any) -> None:
        if module.training and hasattr(module, HEAD):
            output.last_hidden_state = getattr(module, HEAD)(output.last_hidden_state)

    model.register_forward_hook(apply)


class ContrastiveTrainer(ScriptMixin, CleanPushMixin, ResumeMixin, Trainer):
    """Trains sentence embeddings to be recognised in the other dropout pass among those of the batch.

    Each batch is repeated (`[x; x]`, one forward, two dropout masks), pooled to one embedding a row, and

        loss = -1/B sum_i log( exp(cos(a_i, b_i) / t) / sum_j exp(cos(a_i, b_j) / t) )

    as `hf_rdrop.contrastive.info_nce` says. Negatives are those of one process and micro-batch. Evaluation takes pairs
    of sentences (`SentenceCollator`), dropout off: predictions are their cosine similarities.

    Source: Gao, Yao and Chen 2021 (arXiv 2104.08821).
    """

    args: ContrastiveTrainingArguments

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.before: dict[str, float] = {}
        self.add_callback(_ContrastiveCallback(self))

    def check_setup(self) -> None:
        """Refuse what cannot work, before the first step."""
        args, rows = self.args, len(self.train_dataset)
        check_processes(args)
        batch = args.per_device_train_batch_size
        if batch < 2:
            raise ValueError(
                f"--per_device_train_batch_size {batch}: a sentence's negatives are the other ones of its batch, so "
                "there would be none. Use at least 2, better 32 or more."
            )
        all_rows = batch * args.world_size
        if rows < (all_rows if args.dataloader_drop_last else 2):
            raise ValueError(
                f"{rows} sentences fill no batch of {all_rows}: give more, or a smaller --per_device_train_batch_size."
            )
        if not args.dataloader_drop_last and rows % all_rows == 1:
            raise ValueError(
                f"{rows} sentences in batches of {all_rows} leave one alone, which has no negatives. Leave out "
                "--no_dataloader_drop_last, or choose another --per_device_train_batch_size."
            )
        if args.do_eval and (args.bf16_full_eval or args.fp16_full_eval):
            raise ValueError(
                "--bf16_full_eval and --fp16_full_eval change the weights for good, and the model is evaluated before "
                "training, too. Leave them out (--bf16 evaluates in bfloat16)."
            )
        sources = inspect_dropout(self.model)
        has_noise = args.neftune_noise_alpha and embeds_with_noise(self.model)
        if not has_noise and not is_stochastic(sources):
            raise ValueError(
                "Nothing in this model is stochastic in a way that differs between the passes, so both embeddings of "
                "a sentence would be the same, and the loss would only push sentences apart. Found: "
                f"{describe_sources(sources)}. Set a dropout rate with --dropout 0.1."
            )

    # ---- The objective ----

    def embed(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Embeddings `[B, D]` of the rows of a batch."""
        return pool(model(**inputs).last_hidden_state, inputs.get("attention_mask"), self.args.pooling)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        embeddings = self.embed(model, repeat_batch(inputs, 2))
        loss = info_nce(*split_passes(embeddings), self.args.temperature)
        return (loss, {"embeddings": embeddings}) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[None, Tensor, Tensor]:
        """Return the cosine similarity of each pair, and its score."""
        pairs = self._prepare_inputs(inputs)
        scores = pairs.pop("labels")
        with torch.no_grad(), self.compute_loss_context_manager():
            embeddings = self.embed(model, {name: tensor.flatten(0, 1) for name, tensor in pairs.items()})
        a, b = embeddings.float().unflatten(0, (-1, 2)).unbind(1)
        return None, F.cosine_similarity(a, b), scores

    # ---- Around it ----

    def evaluate_before(self) -> dict[str, float]:
        """Correlations of the model as it is now, named `eval_*_before`."""
        metrics = self.evaluate()
        self.before = {f"{name}_before": metrics[name] for name in ("eval_pearson", "eval_spearmanr")}
        return self.before

    def train(self, *args: Any, **kwargs: Any) -> Any:
        set_seed(self.args.seed)  # the same training, whether the model was evaluated before or not
        output = super().train(*args, **kwargs)
        if hasattr(self.model, HEAD):
            delattr(self.model, HEAD)  # what is saved now is a stock model
        return output

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.args.dataloader_drop_last = drop_last

    def create_model_card(self, **card: Any) -> None:
        """Write README.md into the output folder."""
        if not self.is_world_process_zero():
            return
        args, history = self.args, reversed(self.state.log_history)
        run = EmbeddingRun(
            hub_model_id=args.hub_model_id,
            base_name=card.get("finetuned_from"),
            base_folder=str(self.model.config.name_or_path),
            dataset=card.get("dataset"),
            before=self.before,
            after=next((entry for entry in history if "eval_spearmanr" in entry), {}),
            sentences=len(self.train_dataset) if self.train_dataset is not None else None,
            steps=self.state.global_step,
            batch_size=args.per_device_train_batch_size,
            learning_rate=args.learning_rate,
            seed=args.seed,
            pooling=args.pooling,
            temperature=args.temperature,
            mlp_head=args.mlp_head,
        )
        write_card(Path(str(args.output_dir)), run)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return super().floating_point_ops(inputs) * 2


class _ContrastiveCallback(TrainerCallback):
    """Moments of training for which Trainer has no method to override."""

    def __init__(self, trainer: ContrastiveTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.restore_sums()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        set_epoch(kwargs["train_dataloader"], int(state.epoch or 0))
