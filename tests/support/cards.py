"""Trained models with their processors, and their cards."""

import re
from pathlib import Path

from huggingface_hub import ModelCard
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    ASTFeatureExtractor,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    set_seed,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_rdrop import RDropSeq2SeqTrainer, RDropTrainer
from support import ROOT
from support.head_models import build, rows_of
from support.training import make_model, make_rows, train

SHORT = ROOT / "model_cards" / "reference" / "short"
MORE = ("question", "choice", "image", "audio")  # heads of head_models.py
DATA = {"dataset_tags": "glue", "dataset": "GLUE MRPC", "dataset_args": "mrpc", "language": "en"}


def make_tokenizer():
    words = ["<pad>", "</s>", "<mask>", "<unk>", "a", "text", "of", "your", "own", ".", "A"]
    words += [f"w{i}" for i in range(40 - len(words))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        eos_token="</s>",
        mask_token="<mask>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    )


def make_processor(head):
    if head == "image":
        return ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5])
    return ASTFeatureExtractor(num_mel_bins=8, max_length=8) if head == "audio" else make_tokenizer()


def make_language_model(kind):
    set_seed(0)
    small = {"vocab_size": 40, "initializer_range": 0.3}
    if kind == "causal":
        config = GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=128, eos_token_id=1, bos_token_id=1, **small)
        return GPT2LMHeadModel(config)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return BertForMaskedLM(BertConfig(**sizes, **small))


def run(tmp_path, head="single", model=None, **args):
    """A trained trainer with a tokenizer in tmp_path/model, evaluated every epoch and at the end."""
    rows = None
    if head in ("causal", "masked"):
        model = model or make_language_model(head)
        rows = [{**row, "labels": row["input_ids"]} for row in make_rows("single", 32)]
    elif head in MORE:
        model, rows = model or build(head, 0.1), rows_of(head, 32)
    kwargs = {"processing_class": make_processor(head), **args.pop("trainer_kwargs", {})}
    trainer = train(
        model if model is not None else make_model(head),
        "single" if rows else head,
        RDropSeq2SeqTrainer if head == "seq2seq" else RDropTrainer,
        rows=rows,
        trainer_kwargs=kwargs,
        **{"output_dir": str(tmp_path / "model"), "max_steps": 4, "eval_strategy": "no", **args},
    )
    if rows:
        trainer.eval_dataset = rows[:8]
    trainer.evaluate()
    return trainer


def card(trainer, *args, **kwargs):
    """The card's text, after the checks that hold for every card."""
    trainer.create_model_card(*args, **kwargs)
    path = Path(trainer.args.output_dir) / "README.md"
    text = path.read_text("utf-8")
    loaded = ModelCard.load(path)  # checks the metadata, model-index included
    assert ModelCard(str(loaded)).data.to_dict() == loaded.data.to_dict()
    assert "More information needed" not in text and "{%" not in text
    assert not re.search(r"\bNone\b|\bundefined\b", text) and "\n\n\n" not in text
    assert not list(path.parent.glob(".*.part"))
    return text


def section(text, title):
    return re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, flags=re.MULTILINE | re.DOTALL)[1]


def data_of(trainer):
    return ModelCard.load(Path(trainer.args.output_dir) / "README.md").data


def run_usage(text, places, capsys):
    """Execute the card's Python with folders in the place of names; what it printed."""
    (code,) = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    for name, folder in places.items():
        assert f'"{name}"' in code
        code = code.replace(f'"{name}"', repr(str(folder)))
    code = code.replace("max_new_tokens=64", "max_new_tokens=4")  # these models have 32 positions
    names = {}
    capsys.readouterr()
    exec(compile(code, "card", "exec"), names)
    return names, capsys.readouterr().out
