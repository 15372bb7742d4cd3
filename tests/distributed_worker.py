"""Run by `torchrun` in test_distributed.py: the same short runs as there, on two processes; rank 0 writes the logs."""

import json
import sys
from pathlib import Path

import torch
from conftest import HEADS, make_model, make_rows, step_logs, train

SPLITS = ((8, 1), (2, 4))  # rows of a step on one of two processes: at once, or in four micro-batches


def run(head, alpha, size, steps, dropout=1e-9, **args):
    """Two optimizer steps over the same 16 rows, by plain gradient descent."""
    trainer = train(
        make_model(head, dropout),
        head,
        rows=make_rows(head, 16),
        per_device_train_batch_size=size,
        gradient_accumulation_steps=steps,
        rdrop_alpha=alpha,
        optim="sgd",
        learning_rate=1e-2,
        max_grad_norm=100.0,  # the norm is then logged but nothing clipped
        **args,
    )
    return [[entry[key] for key in ("loss", "ce_loss", "kl_loss", "grad_norm")] for entry in step_logs(trainer)]


ECONOMIES = {"rdrop_shared_layers": 1, "rdrop_interval": 2}

if __name__ == "__main__":
    cases = [(head, alpha, *split, {}) for head in HEADS for alpha in (0.0, 3.0) for split in SPLITS]
    cases += [("seq2seq", 3.0, *split, {**ECONOMIES, "rdrop_fused_head": "on"}) for split in SPLITS]
    cases += [("token", 3.0, *split, ECONOMIES) for split in SPLITS]
    logs = [[case, run(*case[:-1], **case[-1], ddp_backend="gloo")] for case in cases]
    logs.append([["dropout"], run("single", 2.0, 8, 1, dropout=0.3, ddp_backend="gloo")])
    assert torch.distributed.get_world_size() == 2
    if torch.distributed.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(logs))
    torch.distributed.destroy_process_group()  # left to the end of the interpreter its threads may abort the process
