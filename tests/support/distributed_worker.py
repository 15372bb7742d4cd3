"""Run by `torchrun` in test_distributed.py: short runs on two processes, of which rank 0 saves what they gave.

The tests make the same runs in one process, for comparison.
"""

import sys

import peft
import torch
import torch.distributed as dist
from transformers import BartConfig, BartForCausalLM, TrainerCallback

from hf_rdrop import RDropTrainer
from hf_rdrop.batch import get_batch_size
from support.settings import HEADS, TINY, arguments, causal_rows, hide_labels, make_passes_differ, rows_for
from support.training import HEADS as BASIC
from support.training import InOrder, make_model, make_rows, step_logs, train

ALL_HEADS = (*BASIC, "causal")
AT_ONCE, ACCUMULATED = (8, 1), (2, 4)  # rows of a step on one of two processes, and in how many micro-batches
# Thirteen rows for two processes: how the last batches are filled up, and to how many rows.
UNEVEN = {
    "filled up": ({}, 16),
    "left as it is": ({"accelerator_config": {"even_batches": False}}, 13),
    "accumulated": ({"gradient_accumulation_steps": 2}, 16),
    "dispatched": ({"dispatched": True}, 14),
}
# What is run by default, and what in the slow tests: cases are (head, option, rows and micro-batches), by the
# table in settings.py.
PARTS = {
    "quick": {
        "cases": [
            *((head, option, ACCUMULATED) for head in ALL_HEADS for option in ("plain", "default")),
            ("token", "shared layer", ACCUMULATED),
            ("seq2seq", "fused head + shared layer", ACCUMULATED),
            ("causal", "fused head", ACCUMULATED),
            *(("images", option, ACCUMULATED) for option in ("default", "fused head")),
            ("token", "jensen_shannon", ACCUMULATED),
            *((head, "unlabeled", ACCUMULATED) for head in ("regression", "token")),
        ],
        "per rank": ["single", "token"],
        "uneven": ["filled up", "left as it is"],
    },
    "slow": {
        "cases": [
            *((head, option, AT_ONCE) for head in ALL_HEADS for option in ("plain", "default")),
            *((head, "shared layer", ACCUMULATED) for head in ALL_HEADS if head != "token"),
            *(("seq2seq", option, ACCUMULATED) for option in ("fused head", "fused head + interval")),
            *(("causal", f"fused head + {option}", ACCUMULATED) for option in ("shared layer", "interval")),
            ("seq2seq", "fused head + shared layer + interval", AT_ONCE),
            *((head, "unlabeled", ACCUMULATED) for head in ("single", "multi", "seq2seq", "causal")),
        ],
        "per rank": ["multi", "regression", "seq2seq", "causal"],
        "uneven": ["accumulated", "dispatched"],
    },
}
# (torch cannot accumulate gradients over a static graph.)
DDP_OPTIONS = {"find_unused_parameters": ACCUMULATED, "static_graph": AT_ONCE, "gradient_as_bucket_view": ACCUMULATED}
LOGGED = ("loss", "ce_loss", "kl_loss", "grad_norm")
COLLECTIVES = [
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "gather_object",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
]


class Recorder(TrainerCallback):
    """Whole gradients of each optimizer step before they are applied; the collectives within and between steps."""

    def __init__(self):
        self.gradients, self.within, self.between, self.in_step = [], [], [], False

    def on_step_begin(self, *args, **kwargs):
        self.in_step = True

    def on_pre_optimizer_step(self, *args, model, **kwargs):
        gradients = {}
        for name, parameter in model.named_parameters():
            if (grad := parameter.grad) is not None:
                grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
                gradients[name.replace("_checkpoint_wrapped_module.", "")] = grad.clone()
        self.gradients.append(gradients)

    def on_step_end(self, *args, **kwargs):
        self.in_step = False

    def watch(self, name):
        original = getattr(dist, name)

        def call(*args, **kwargs):
            (self.within if self.in_step else self.between).append(name)
            return original(*args, **kwargs)

        setattr(dist, name, call)
        return original


class RecordingTrainer(RDropTrainer):
    """Remembers which rows it was given, and what it returned for them."""

    ddp_options = ()

    def train(self, *args, **kwargs):
        self.seen = []  # (optimizer steps done, rows, loss) of each micro-batch
        for name in self.ddp_options:
            setattr(self.accelerator.ddp_handler, name, True)
        return super().train(*args, **kwargs)

    def training_step(self, model, inputs, *args, **kwargs):
        size = get_batch_size(inputs)
        columns = {name: value.tolist() for name, value in inputs.items() if len(value) == size}
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.seen.append((self.state.global_step, rows, loss.item()))
        return loss


def run(head, size, steps, model=None, rows=None, ddp_options=(), has_dropout=False, option="default", **args):
    """Plain gradient descent: by default two optimizer steps, each over the same 16 rows."""
    model, recorder, args = model or HEADS[head].model(TINY), Recorder(), {**arguments(option), **args}
    if rows is None:
        rows = rows_for(head, option)
    if args["rdrop_alpha"] and "rdrop_interval" not in args and not has_dropout:
        make_passes_differ(model)
    defaults = {"optim": "sgd", "learning_rate": 1e-2, "max_grad_norm": 100.0}  # the norm is logged, nothing clipped
    originals = {name: recorder.watch(name) for name in COLLECTIVES}
    try:
        trainer = train(
            model,
            head,
            type("Recording", (RecordingTrainer,), {"ddp_options": ddp_options}),
            rows=rows,
            trainer_kwargs={"callbacks": [recorder]},
            per_device_train_batch_size=size,
            **{**defaults, "gradient_accumulation_steps": steps, **args},
        )
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return {
        "logs": [[entry[key] for key in LOGGED] for entry in step_logs(trainer)],
        "gradients": recorder.gradients,
        "seen": trainer.seen,
        "within": recorder.within,
        "between": recorder.between,
        "fused": trainer.rdrop_run.fused_head is not None,
    }


def run_uneven(dispatched=False, gradient_accumulation_steps=1, **args):
    """One epoch over thirteen rows, four a batch."""
    rows = make_rows("token", 13)
    args = {"num_train_epochs": 1, "max_steps": -1, **args}
    if dispatched:  # rank 0 reads the rows and hands them out
        rows, args["max_steps"] = InOrder(rows), 2
    return run("token", 4, gradient_accumulation_steps, rows=rows, **args)


def record_masks(**args):
    """What a dropout module kept in the first step: `[2 B, T, D]`."""
    model, masks = make_model("single", 0.3), []
    model.bert.encoder.layer[0].output.dropout.register_forward_hook(lambda *call: masks.append(call[-1] != 0))
    run("single", 8, 1, model, has_dropout=True, **args)
    return masks[0]


def run_by_length(**args):
    """Two epochs over 24 rows in the order of LengthGroupedSampler, with dropout."""
    order = {"train_sampling_strategy": "group_by_length", "num_train_epochs": 2, "max_steps": -1}
    model, rows = make_model("single", 0.3), make_rows("single", 24)
    return run("single", 3, 1, model, rows, has_dropout=True, **order, **args)["seen"]


def run_unshifted(adapter=False, **args):
    """A language model that does not shift its labels, though its class is among those that do; the labelled rows of
    each step are all on the second of two ranks."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "d_model": 16, "decoder_layers": 1, "decoder_ffn_dim": 32, "decoder_attention_heads": 2}
    model = BartForCausalLM(BartConfig(**sizes, dropout=TINY, init_std=0.3))
    if adapter:
        model = peft.get_peft_model(
            model, peft.LoraConfig(target_modules=["self_attn.q_proj"], init_lora_weights=False)
        )
    rows = [hide_labels(row) if i // 2 % 2 == 0 else row for i, row in enumerate(causal_rows())]
    args = {"max_steps": 2, "ddp_find_unused_parameters": True, **args}
    return run("causal", 2, 4, model, InOrder(rows), has_dropout=True, **args)


def of_all_ranks(value):
    """What each rank has: a list on rank 0, None elsewhere."""
    values = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values)
    return values


def main(output, part):
    gloo, chosen = {"ddp_backend": "gloo"}, PARTS[part]
    found = {
        "cases": [(case, run(case[0], *case[2], option=case[1], **gloo)) for case in chosen["cases"]],
        "uneven": {name: run_uneven(**UNEVEN[name][0], **gloo) for name in chosen["uneven"]},
    }
    own = {"average_tokens_across_devices": False}
    found["per rank"] = {head: run(head, *ACCUMULATED, **own, **gloo) for head in chosen["per rank"]}
    if part == "quick":
        found |= {"masks": record_masks(**gloo), "by length": run_by_length(**gloo)}
        found["unshifted"] = [run_unshifted(adapter, **gloo) for adapter in (False, True)]
    else:
        found["options"] = [
            (name, head, option, run(head, *split, ddp_options=(name,), option=option, **gloo))
            for name, split in DDP_OPTIONS.items()
            for head, option in (("token", "shared layer"), ("causal", "fused head"))
        ]
    found = of_all_ranks(found)
    if dist.get_rank() == 0:
        torch.save(found, output)


if __name__ == "__main__":
    main(*sys.argv[1:])
    dist.destroy_process_group()  # left to the end of the interpreter its threads may abort the process
