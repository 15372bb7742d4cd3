"""The heads and the options of R-Drop that are tried together: one table for accumulation, resuming and ranks."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from hf_rdrop import RDropSeq2SeqTrainer, RDropTrainer
from support.head_models import build, rows_of
from support.training import HEADS as BASIC
from support.training import VOCAB, make_model, make_rows, train
from support.vision_language import image_rows, make_qwen

TINY = 1e-9  # a dropout rate that makes a model stochastic on paper and never drops anything


class Head(NamedTuple):
    """A tiny model, of a dropout rate and changes of its configuration, and rows of unequal numbers of items."""

    model: Callable[..., nn.Module]
    rows: Callable[[int], list[dict[str, Any]]]


def make_llama(dropout=TINY, **config):
    """A causal language model of two layers."""
    set_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = {**sizes, "vocab_size": VOCAB, "num_key_value_heads": 2, "pad_token_id": 0, **config}
    return LlamaForCausalLM(LlamaConfig(attention_dropout=dropout, **config))


def causal_rows(rows=16):
    return [{**row, "labels": [i or -100 for i in row["input_ids"]]} for row in make_rows("token", rows)]


HEADS = {
    **{head: Head(partial(make_model, head), partial(make_rows, head)) for head in BASIC},
    "causal": Head(make_llama, causal_rows),
    "images": Head(make_qwen, image_rows),
    "gpt2": Head(partial(build, "causal"), partial(rows_of, "causal")),
    **{
        head: Head(partial(build, head), partial(rows_of, head))
        for head in ("question", "choice", "masked", "image", "audio", "tuple")
    },
}


def unlike(outputs, inputs):
    """Scores that differ between the passes without dropout, and which items count."""
    size = len(inputs["labels"])
    logits = outputs["logits"] if "logits" in outputs else outputs[0]
    return torch.cat((logits[:size], 1.5 * logits[size:])), inputs["labels"] != -100


OPTIONS = {
    "plain": {"rdrop_alpha": 0.0},
    "default": {},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "three passes": {"rdrop_passes": 3},
    "fused head": {"rdrop_fused_head": "on"},
    "shared layer": {"rdrop_shared_layers": 1},
    "interval": {"rdrop_interval": 2},
    "schedule": {"rdrop_alpha_schedule": "linear", "rdrop_alpha_warmup": 4},
    "jensen_shannon": {"rdrop_agreement": "jensen_shannon"},
    "two divergences": {"rdrop_agreement": "symmetric_kl + 0.5 * jensen_shannon"},
    "hidden states": {"rdrop_agreement": "symmetric_kl + 0.1 * hidden_states"},
    "own logits": {"logits_for_agreement": unlike},
    "unlabeled": {"rdrop_unlabeled": True},
    "layer drop": {"rdrop_layer_drop": 0.3},
    "inserted dropout": {"rdrop_insert_dropout": 0.2},
}
# The heads for which an option means something; all heads where it is not named.
FITS = {
    "label smoothing": {*HEADS} - {"multi", "regression", "tuple", "images"},
    "fused head": {"seq2seq", "causal", "gpt2", "masked", "images"},
    "shared layer": {*HEADS} - {"tuple", "images"},
    "jensen_shannon": {*HEADS} - {"regression"},
    "two divergences": {*HEADS} - {"regression"},
    "hidden states": {*HEADS} - {"tuple"},
    "own logits": {"single", "token", "seq2seq"},
    "layer drop": {*HEADS} - {"tuple"},
    "inserted dropout": {"causal", "gpt2", "image"},
}
DRAWING = {"layer drop", "inserted dropout"}  # draw beside dropout, differently for each division of the rows


def parts_of(option: str) -> list[str]:
    return option.split(" + ")


def arguments(option: str) -> dict[str, Any]:
    """Training arguments of an option, or of several as in `"fused head + shared layer"`."""
    found = {"rdrop_alpha": 3.0}
    for part in parts_of(option):
        found |= OPTIONS[part]
    return found


def fits(head: str, option: str) -> bool:
    """Whether an option, or several, means something to a head."""
    return all(head in FITS.get(part, HEADS) for part in parts_of(option))


def hide_labels(row):
    """The row without its labels: -100 in each place."""
    hidden = {}
    for name in {"labels", "start_positions", "end_positions"} & row.keys():
        value = row[name]
        hidden[name] = [type(x)(-100) for x in value] if isinstance(value, list) else type(value)(-100)
    return {**row, **hidden}


def rows_for(head, option, count=16):
    """Rows of a head; with `unlabeled`, two in five have no label."""
    rows = HEADS[head].rows(count)
    if "unlabeled" in parts_of(option):
        rows = [hide_labels(row) if i % 5 < 2 else row for i, row in enumerate(rows)]
    return rows


def make_passes_differ(model, passes=2):
    """Put a fixed mask for each of the passes before the head, in place of dropout, whichever rows are in a batch."""
    masks = (torch.rand(passes, 16, generator=torch.Generator().manual_seed(3)) > 0.3).float()

    def drop(module, args):
        (hidden,) = args
        kept = masks.to(hidden.dtype).repeat_interleave(len(hidden) // passes, 0)
        return hidden * (kept[:, None] if hidden.dim() == 3 else kept) if module.training else hidden

    heads = ("classifier", "lm_head", "qa_outputs", "cls", "out")
    head = next(module for name, module in model.named_modules() if name in heads)
    head.register_forward_pre_hook(drop)


def run(head, option, size=16, steps=1, dropout=TINY, trainer_class=None, rows=None, **args):
    """A short run over the same 16 rows in each step; without dropout, fixed masks make the passes differ."""
    args = {"optim": "sgd", "learning_rate": 1e-2, **arguments(option), **args}
    model, hook = HEADS[head].model(dropout), args.pop("logits_for_agreement", None)
    if dropout == TINY and args["rdrop_alpha"] and "rdrop_interval" not in args and hook is None:
        make_passes_differ(model, args.get("rdrop_passes", 2))
    if trainer_class is Trainer:
        args = {name: value for name, value in args.items() if not name.startswith("rdrop_")}
        args["args_class"] = TrainingArguments
    return train(
        model,
        head,
        trainer_class or (RDropSeq2SeqTrainer if head == "seq2seq" else RDropTrainer),
        rows=rows_for(head, option) if rows is None else rows,
        trainer_kwargs={} if hook is None else {"logits_for_agreement": hook},
        per_device_train_batch_size=size,
        gradient_accumulation_steps=steps,
        **args,
    )
