"""Training steps of the benchmark: every head, every arm, through the real Trainer objects."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    MarianConfig,
    MarianMTModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from benchmarking.loss import official_kl
from benchmarking.measure import Arm
from hf_rdrop import RDropTrainer, RDropTrainingArguments
from hf_rdrop.cost import predict_cost
from hf_rdrop.cost.model_shape import describe_model

PLAIN, DOUBLED, TWO_FORWARDS, RDROP, FUSED = "plain B", "plain 2B", "two forwards", "r-drop", "r-drop + fused"
TRUNK_3_4 = "trunk 3L/4"


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model and of its batches; an encoder-decoder has half of its layers in each part."""

    layers: int
    width: int
    batch: int
    length: int
    vocab: int


class Head(NamedTuple):
    """Parts from which the step of one head is made.

    Args:
        make_model: its randomly initialised model.
        labels: number of classes of a classification head, or 0 for a head over the vocabulary.
        trunk_all: whether something above the layers that can be shared is stochastic, so that k = L is possible.
        labelled: share of the tokens that have a label.
    """

    make_model: Callable[[Sizes], nn.Module]
    labels: int
    trunk_all: bool
    labelled: float = 1.0


def _bert(sizes: Sizes, **kwargs: Any) -> BertConfig:
    return BertConfig(
        vocab_size=sizes.vocab,
        hidden_size=sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=max(1, sizes.width // 64),
        intermediate_size=4 * sizes.width,
        max_position_embeddings=max(512, sizes.length),
        **kwargs,
    )


def _marian(sizes: Sizes) -> MarianMTModel:
    side = {"layers": sizes.layers // 2, "attention_heads": max(1, sizes.width // 64), "ffn_dim": 4 * sizes.width}
    both = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in side.items()}
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "forced_eos_token_id": 1, "decoder_start_token_id": 0}
    positions = max(512, sizes.length)
    return MarianMTModel(
        MarianConfig(vocab_size=sizes.vocab, d_model=sizes.width, max_position_embeddings=positions, **both, **tokens)
    )


def _gpt2(sizes: Sizes) -> GPT2LMHeadModel:
    heads, positions = max(1, sizes.width // 64), max(512, sizes.length)
    config = {"n_embd": sizes.width, "n_layer": sizes.layers, "n_head": heads, "n_positions": positions}
    return GPT2LMHeadModel(GPT2Config(vocab_size=sizes.vocab, **config, bos_token_id=1, eos_token_id=1))


HEADS = {
    "sequence-classification": Head(lambda s: BertForSequenceClassification(_bert(s, num_labels=3)), 3, True),
    "token-classification": Head(lambda s: BertForTokenClassification(_bert(s, num_labels=13)), 13, True),
    "translation": Head(_marian, 0, True),
    "causal-lm": Head(_gpt2, 0, False),
    "masked-lm": Head(lambda s: BertForMaskedLM(_bert(s)), 0, False, labelled=0.15),
}


def trunk_layers(head: str, layers: int) -> dict[str, int]:
    """Count the layers that each trunk arm shares (of the encoder where there is a decoder); equal ones once."""
    layers = layers // 2 if head == "translation" else layers
    wanted = {"trunk L/2": layers // 2, TRUNK_3_4: min(round(0.75 * layers), layers - 1), "trunk L-1": layers - 1}
    if HEADS[head].trunk_all:
        wanted["trunk L"] = layers
    first = {k: name for name, k in reversed(wanted.items())}
    return {name: k for name, k in wanted.items() if k >= 1 and first[k] == name}


def step_settings(head: str, layers: int) -> dict[str, dict[str, Any]]:
    """The arguments of every arm for a head, in the order of the tables.

    Trunk and interval come with the fused head where there is a vocabulary: so users have them, with
    rdrop_fused_head="auto".
    """
    off, fused = {"rdrop_fused_head": "off"}, {"rdrop_fused_head": "on"}
    arms = {PLAIN: {}, DOUBLED: {}, TWO_FORWARDS: {}, RDROP: off}
    if not HEADS[head].labels:
        arms[FUSED] = fused
    usual = off if HEADS[head].labels else fused
    arms |= {name: usual | {"rdrop_shared_layers": k} for name, k in trunk_layers(head, layers).items()}
    return arms | {f"interval {n}": usual | {"rdrop_interval": n} for n in (2, 4)}


def make_batch(head: str, sizes: Sizes, seed: int) -> dict[str, Tensor]:
    """Random rows of full length; the labels of a masked language model are at its share of the positions."""
    generator = torch.Generator().manual_seed(seed)
    shape = (sizes.batch, sizes.length)
    batch = {"input_ids": torch.randint(2, sizes.vocab, shape, generator=generator)}
    batch["attention_mask"] = torch.ones(shape, dtype=torch.long)
    items = shape[:1] if head == "sequence-classification" else shape
    labels = torch.randint(HEADS[head].labels or sizes.vocab, items, generator=generator)
    if HEADS[head].labelled < 1:
        order = torch.rand(shape, generator=generator).argsort(dim=1)
        labels[order >= max(1, round(HEADS[head].labelled * sizes.length))] = -100
    return batch | {"labels": labels}


class TwoForwardsTrainer(Trainer):
    """R-Drop as it is written by hand: the model is called twice, and its logits are compared with `official_kl`."""

    alpha = 1.0
    shift_labels = False

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        first, second = model(**inputs), model(**inputs)
        logits, labels = (first.logits, second.logits), inputs["labels"]
        if self.shift_labels:
            logits, labels = tuple(scores[:, :-1] for scores in logits), labels[:, 1:]
        loss = (first.loss + second.loss) / 2 + self.alpha / 2 * official_kl(*logits, labels == -100)
        return (loss, first) if return_outputs else loss


class Step:
    """Optimizer steps as `Trainer` takes them, with everything they need already there.

    Args:
        trainer: it takes its first step here (optimizer state, checks of the first batch, compilation).
        batch: what every step is taken on.
        steps: how many a call takes.
    """

    def __init__(self, trainer: Trainer, batch: dict[str, Tensor], steps: int = 1) -> None:
        self.trainer, self.steps = trainer, steps
        self.batch = {name: value.to(trainer.args.device) for name, value in batch.items()}
        trainer.remove_callback(PrinterCallback)
        trainer.train()

    def __call__(self) -> None:
        trainer = self.trainer
        for _ in range(self.steps):
            (batch,), items = trainer.get_batch_samples(iter([self.batch]), 1, trainer.args.device)
            trainer.training_step(trainer.model_wrapped, batch, items)
            trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
            trainer.optimizer.step()
            trainer.lr_scheduler.step()
            trainer.model.zero_grad()
            trainer.state.global_step += 1


def cost_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `predict_cost` for those of an arm of RDropTrainer."""
    return {
        "shared_layers": settings.get("rdrop_shared_layers", 0),
        "interval": settings.get("rdrop_interval", 1),
        "fused_head": settings["rdrop_fused_head"] == "on",
    }


def predict(model: nn.Module, batch: dict[str, Tensor], settings: dict[str, Any], itemsize: int) -> dict[str, float]:
    """Predict `time` and `memory` of an arm of RDropTrainer over the plain step's, by the cost model."""
    shape = describe_model(model, batch, itemsize=itemsize)
    if shape is None:
        return {}
    cost = predict_cost(shape, **cost_settings(settings))
    return cost._asdict()


def step_arms(
    head: str,
    sizes: Sizes,
    names: Sequence[str] | None,
    *,
    alpha: float,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    folder: str,
) -> Iterator[Arm]:
    """Training steps of one head; each arm has its own copy of the same model.

    Args:
        head: a key of `HEADS`.
        sizes: of the model and of the batch B.
        names: the arms to make; all by default.
        folder: where the trainers may write.
    """
    set_seed(seed)
    model = HEADS[head].make_model(sizes)
    for name, settings in step_settings(head, sizes.layers).items():
        if names is not None and name not in names:
            continue
        plain = name in (PLAIN, DOUBLED, TWO_FORWARDS)
        rows = 2 * sizes.batch if name == DOUBLED else sizes.batch
        batch = make_batch(head, Sizes(**{**vars(sizes), "batch": rows}), seed)
        args = (TrainingArguments if plain else RDropTrainingArguments)(
            output_dir=folder,
            max_steps=1,
            per_device_train_batch_size=rows,
            lr_scheduler_type="constant",
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            seed=seed,
            use_cpu=device.type == "cpu",
            bf16=dtype == torch.bfloat16,
            **({} if plain else {"rdrop_alpha": alpha, **settings}),
        )
        trainer_class = TwoForwardsTrainer if name == TWO_FORWARDS else Trainer if plain else RDropTrainer
        data = [{key: value[row] for key, value in batch.items()} for row in range(rows)]
        trainer = trainer_class(copy.deepcopy(model), args, train_dataset=data, data_collator=default_data_collator)
        if name == TWO_FORWARDS:
            trainer.alpha, trainer.shift_labels = alpha, head == "causal-lm"
        step = Step(trainer, batch, settings.get("rdrop_interval", 1))
        prediction = {} if plain else predict(trainer.model, step.batch, settings, dtype.itemsize)
        yield Arm(name, step, step.steps, settings, prediction)
