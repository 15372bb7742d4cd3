"""The tokenizers of init_model.py."""

import json
from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BYTES = [f"<0x{value:02X}>" for value in range(256)]


def train_tokenizer(
    texts: Sequence[str], architecture: str, vocab_size: int, max_length: int
) -> PreTrainedTokenizerFast:
    """Train a tokenizer for an `"encoder"` (cased WordPiece) or an `"encoder-decoder"` (cased BPE with bytes).

    The same texts give the same vocabulary, of at most `vocab_size` tokens.

    Raises:
        ValueError: `vocab_size` does not even hold the characters of the texts.
    """
    encoder = architecture == "encoder"
    tokenizer = _wordpiece(texts, vocab_size) if encoder else _bpe(texts, vocab_size)
    if tokenizer.get_vocab_size() > vocab_size:
        raise ValueError(
            f"--vocab_size {vocab_size} is too small: the characters of this text and the special tokens alone "
            f"need {tokenizer.get_vocab_size()}."
        )
    if encoder:
        specials = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    else:
        specials = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        model_input_names=["input_ids", *(["token_type_ids"] if encoder else []), "attention_mask"],
        clean_up_tokenization_spaces=False,
        **{f"{name}_token": token for name, token in specials.items()},
    )


def _wordpiece(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    # Control characters dropped, blanks unified, Chinese characters set apart; case and accents kept.
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, min_frequency=2, special_tokens=specials, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    return tokenizer


def _bpe(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    # NFC and single blanks: nothing a translation should be able to write gets lost.
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    trainer = trainers.BpeTrainer(
        vocab_size=max(vocab_size - len(BYTES), 0), min_frequency=2, special_tokens=specials, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    # Characters never seen are spelled in bytes, which the trainer leaves out of the vocabulary.
    state = json.loads(tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary.update({token: len(vocabulary) + index for index, token in enumerate(BYTES)})
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A $B </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    return tokenizer
