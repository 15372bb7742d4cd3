"""Tokenizer of init_model.py: byte-pair encoding that keeps case and falls back to bytes."""

import json
from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BYTES = [f"<0x{value:02X}>" for value in range(256)]
# Special tokens by architecture (ids in this order), and where they go around one text and around two.
SPECIAL_TOKENS = {
    "encoder": {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"},
    "decoder": {"bos": "<|endoftext|>", "pad": "<pad>", "eos": "<|endoftext|>", "unk": "<unk>"},
    "encoder-decoder": {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>"},
}
TEMPLATES = {
    "encoder": ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"),
    "decoder": ("$A", "$A $B"),  # run_clm.py puts the end after each text, so that it is also where the next begins
    "encoder-decoder": ("$A </s>", "$A $B </s>"),
}


def train_tokenizer(
    texts: Sequence[str], architecture: str, vocab_size: int, max_length: int
) -> PreTrainedTokenizerFast:
    """Train a tokenizer for an `"encoder"`, a `"decoder"` or an `"encoder-decoder"`.

    Text is put into Unicode form NFC with single blanks, and split at blanks and around punctuation; nothing else is
    changed, so that decoding gives the text back. The same texts give the same vocabulary, in the same order. (This
    is why encoders do not get a WordPiece vocabulary: the library's trainer numbers it differently in every process.)

    Raises:
        ValueError: `vocab_size` does not even hold the characters of the texts.
    """
    specials = SPECIAL_TOKENS[architecture]
    tokenizer = _train_bpe(texts, list(dict.fromkeys(specials.values())), specials["unk"], vocab_size)
    if tokenizer.get_vocab_size() > vocab_size:
        raise ValueError(
            f"--vocab_size {vocab_size} is too small: special tokens, {len(BYTES)} bytes and the characters of this "
            f"text alone need {tokenizer.get_vocab_size()}."
        )
    single, pair = TEMPLATES[architecture]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single,
        pair=pair,
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in specials.values()],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        model_input_names=["input_ids", *(["token_type_ids"] if architecture == "encoder" else []), "attention_mask"],
        clean_up_tokenization_spaces=False,
        **{f"{name}_token": token for name, token in specials.items()},
    )


def _train_bpe(texts: Sequence[str], specials: list[str], unknown: str, vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token=unknown, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    trainer = trainers.BpeTrainer(
        vocab_size=max(vocab_size - len(BYTES), 0), min_frequency=2, special_tokens=specials, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    # Characters that training never saw are spelled in bytes, which the trainer leaves out of the vocabulary.
    state = json.loads(tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary.update({token: len(vocabulary) + index for index, token in enumerate(BYTES)})
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer
