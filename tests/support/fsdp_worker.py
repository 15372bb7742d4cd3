"""Run by `accelerate launch` in test_fsdp.py: FSDP2 on two processes without a GPU; rank 0 saves what they gave.

Accelerate shards on GPUs only: on a CPU it silently trains with DDP. So it is told here that this is a GPU, whose
device is the CPU; what happens then is its own.
"""

import os
import sys

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType

from support.distributed_worker import ACCUMULATED, AT_ONCE, FUSED, PLAIN, R_DROP, SHARED, make_any_model, run

LAYERS = {"seq2seq": "MarianEncoderLayer,MarianDecoderLayer", "causal": "LlamaDecoderLayer"}
UNTIED, TIED = {"tie_word_embeddings": False}, {"tie_word_embeddings": True}
# (Accelerate 1.15 cannot shard encoder-decoders with shared embeddings, whoever trains them.)
NOTHING_SHARED = {**UNTIED, "share_encoder_decoder_embeddings": False}
BOTH = {**FUSED, **SHARED}
# (head, changes of the configuration, arguments, rows and micro-batches, activation checkpointing)
PARTS = {
    "quick": [
        ("token", {}, PLAIN, AT_ONCE, False),
        ("token", {}, SHARED, ACCUMULATED, True),
        ("causal", TIED, BOTH, ACCUMULATED, True),
        ("causal", UNTIED, R_DROP, AT_ONCE, False),
        ("seq2seq", NOTHING_SHARED, BOTH, AT_ONCE, False),
    ],
    "slow": [
        *((head, {}, args, AT_ONCE, False) for head in ("single", "multi", "regression") for args in (PLAIN, SHARED)),
        *((head, {}, R_DROP, ACCUMULATED, False) for head in ("single", "multi", "regression", "token")),
        *(("seq2seq", NOTHING_SHARED, args, ACCUMULATED, True) for args in (PLAIN, R_DROP, SHARED, FUSED, BOTH)),
        *(("causal", UNTIED, args, ACCUMULATED, True) for args in (PLAIN, R_DROP, SHARED, FUSED, BOTH)),
        *(("causal", TIED, args, AT_ONCE, False) for args in (PLAIN, R_DROP, SHARED, FUSED, BOTH)),
    ],
}


def run_sharded(head, config, args, split, checkpointing):
    layers = LAYERS.get(head, "BertLayer")
    os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = layers
    os.environ["FSDP_ACTIVATION_CHECKPOINTING"] = str(checkpointing).lower()
    model = make_any_model(head, **config)
    result = run(head, *split, model, **args, use_cpu=False)
    names = {type(module).__name__ for module in model.modules()}
    assert f"FSDP{layers.partition(',')[0]}" in names and ("FSDPCheckpointWrapper" in names) == checkpointing, names
    return result


if __name__ == "__main__":
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    output, part = sys.argv[1:]
    found = [(case, run_sharded(*case)) for case in PARTS[part]]
    assert dist.get_world_size() == 2
    if dist.get_rank() == 0:
        torch.save(found, output)
    dist.destroy_process_group()
