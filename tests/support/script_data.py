"""Tiny models and data files for the tests of the scripts; everything is made here, nothing is loaded."""

import csv
import gzip
import json
import random
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    MarianConfig,
    MarianMTModel,
    PreTrainedTokenizerFast,
    set_seed,
)

GOOD, BAD = ["good", "great", "fine", "lovely"], ["bad", "poor", "awful", "dull"]
NAMES, PLACES = ["anna", "bob", "carla"], ["paris", "rome", "oslo"]
OTHER = ["the", "a", "film", "book", "was", "is", "very", "in", "and", "saw", "we", "today", "of", "it"]
GERMAN = ["der", "ein", "film", "buch", "war", "ist", "sehr", "in", "und", "sah", "wir", "heute", "von", "es"]
WORDS = sorted({*GOOD, *BAD, *NAMES, *PLACES, *OTHER, *GERMAN})
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def make_tokenizer(pair_template: bool = True, length: int = 48) -> PreTrainedTokenizerFast:
    """WordPiece over WORDS; any other word is spelled letter by letter."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*specials, *WORDS, *LETTERS, *(f"##{letter}" for letter in LETTERS), *".,!?"]
    tokenizer = Tokenizer(
        models.WordPiece({piece: i for i, piece in enumerate(dict.fromkeys(pieces))}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    ids = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    if pair_template:
        single, pair = "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"
    else:
        single, pair = "$A [SEP]", "$A $B [SEP]"
    tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=length,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        eos_token="[SEP]",
        mask_token="[MASK]",
    )


def make_encoder(folder: Path, dropout: float = 0.1) -> str:
    """A BERT of two layers, 16 wide."""
    tokenizer = make_tokenizer()
    set_seed(1)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=48,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=0.2,
        pad_token_id=0,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_decoder(folder: Path, dropout: float = 0.1, **options: Any) -> str:
    """A GPT-2 of two layers, 16 wide; its tokenizer ends every text with [SEP], the end-of-sequence token."""
    tokenizer = make_tokenizer(pair_template=False)
    set_seed(1)
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    sizes = {"vocab_size": len(tokenizer), "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 48}
    ids = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    GPT2LMHeadModel(GPT2Config(**rates, **{**sizes, **options}, **ids, initializer_range=0.2)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_seq2seq(folder: Path, dropout: float = 0.1, length: int = 48) -> str:
    """A Marian model of one layer a side, 16 wide."""
    tokenizer = make_tokenizer(pair_template=False, length=length)
    set_seed(1)
    config = MarianConfig(
        vocab_size=len(tokenizer),
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=length,
        dropout=dropout,
        init_std=0.2,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        decoder_start_token_id=2,
        forced_eos_token_id=3,
    )
    MarianMTModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def sentences(rows: int, seed: int) -> list[tuple[str, int]]:
    """Sentences of 3 to 9 words with one good (1) or bad (0) word in them."""
    draw = random.Random(seed)
    result = []
    for _ in range(rows):
        label = draw.randrange(2)
        words = draw.choices(OTHER, k=draw.randrange(2, 9))
        words.insert(draw.randrange(len(words)), draw.choice(GOOD if label else BAD))
        result.append((" ".join(words), label))
    return result


def classification_rows(kind: str, rows: int, seed: int) -> list[dict[str, Any]]:
    """Rows for one sentence or two, and each kind of label."""
    texts, others = sentences(rows, seed), sentences(rows, seed + 1000)
    if kind == "names":
        return [{"text": text, "label": ["negative", "positive"][label]} for text, label in texts]
    if kind == "pairs":
        return [
            {"sentence1": a, "sentence2": b, "label": int(x == y)}
            for (a, x), (b, y) in zip(texts, others, strict=True)
        ]
    if kind == "three-way":
        return [{"premise": a, "hypothesis": b, "label": x + y} for (a, x), (b, y) in zip(texts, others, strict=True)]
    if kind == "regression":
        return [
            {"sentence1": a, "sentence2": b, "label": 2.5 * (x + y) + 0.25}
            for (a, x), (b, y) in zip(texts, others, strict=True)
        ]
    if kind == "multi-label":
        found = [("film" in text, "book" in text) for text, _ in texts]
        return [
            {"text": text, "label": [["bad", "good"][label]] + ["film"] * film + ["book"] * book}
            for (text, label), (film, book) in zip(texts, found, strict=True)
        ]
    raise AssertionError(kind)


def ner_rows(rows: int, seed: int, tags: str = "ner_tags") -> list[dict[str, Any]]:
    """Words and IOB2 tags of persons and places; some places have two words, one of them unknown to the vocabulary."""
    draw = random.Random(seed)
    result = []
    for _ in range(rows):
        words, labels = [], []
        for _ in range(draw.randrange(2, 7)):
            kind = draw.randrange(4)
            if kind == 0:
                words, labels = [*words, draw.choice(NAMES)], [*labels, "B-person"]
            elif kind == 1:
                words, labels = [*words, draw.choice(PLACES), "zoo"], [*labels, "B-place", "I-place"]
            else:
                words, labels = [*words, draw.choice(OTHER)], [*labels, "O"]
        result.append({"tokens": words, tags: labels})
    return result


def translation_rows(rows: int, seed: int) -> list[dict[str, Any]]:
    """Word for word translations of 2 to 8 words."""
    draw = random.Random(seed)
    drawn = [draw.choices(range(len(OTHER)), k=draw.randrange(2, 9)) for _ in range(rows)]
    return [
        {"translation": {"en": " ".join(OTHER[i] for i in row), "de": " ".join(GERMAN[i] for i in row)}}
        for row in drawn
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    """Write rows in the format that the file's name says."""
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="," if path.suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)
