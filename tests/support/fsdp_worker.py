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

from support.distributed_worker import ACCUMULATED, AT_ONCE, run
from support.settings import HEADS, TINY

LAYERS = {"seq2seq": "MarianEncoderLayer,MarianDecoderLayer", "causal": "LlamaDecoderLayer"}
UNTIED, TIED = {"tie_word_embeddings": False}, {"tie_word_embeddings": True}
# (Accelerate 1.15 cannot shard encoder-decoders with shared embeddings, whoever trains them.)
NOTHING_SHARED = {**UNTIED, "share_encoder_decoder_embeddings": False}
OPTIONS = ("plain", "default", "shared layer", "fused head", "fused head + shared layer")
# (head, changes of the configuration, option, rows and micro-batches, activation checkpointing)
PARTS = {
    "quick": [
        ("token", {}, "plain", AT_ONCE, False),
        ("token", {}, "shared layer", ACCUMULATED, True),
        ("causal", TIED, "fused head + shared layer", ACCUMULATED, True),
        ("causal", UNTIED, "default", AT_ONCE, False),
        ("seq2seq", NOTHING_SHARED, "fused head + shared layer", AT_ONCE, False),
    ],
    "slow": [
        *(
            (head, {}, option, AT_ONCE, False)
            for head in ("single", "multi", "regression")
            for option in ("plain", "shared layer")
        ),
        *((head, {}, "default", ACCUMULATED, False) for head in ("single", "multi", "regression", "token")),
        *(("seq2seq", NOTHING_SHARED, option, ACCUMULATED, True) for option in OPTIONS),
        *(("causal", UNTIED, option, ACCUMULATED, True) for option in OPTIONS),
        *(("causal", TIED, option, AT_ONCE, False) for option in OPTIONS),
    ],
}


def run_sharded(head, config, option, split, checkpointing):
    layers = LAYERS.get(head, "BertLayer")
    os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = layers
    os.environ["FSDP_ACTIVATION_CHECKPOINTING"] = str(checkpointing).lower()
    model = HEADS[head].model(TINY, **config)
    result = run(head, *split, model, option=option, use_cpu=False)
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
