"""run_clm.py: tokens and blocks against naive loops, scores of held-out text by hand, masks, short real runs."""

import gzip
import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, EvalPrediction, GPT2Config

import init_model
import run_clm
from support import script_data as made
from tasks import language_modelling

QUICK = ["--use_cpu", "--disable_tqdm", "true", "--logging_steps", "1", "--learning_rate", "1e-2", "--report_to=none"]
PAD, CLS, SEP, MASK = 0, 2, 3, 4


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return made.make_decoder(tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return made.make_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same texts in the formats there are: training and validation of each."""
    folder = tmp_path_factory.mktemp("texts")
    found = {}
    for seed, (split, rows) in enumerate((("train", 40), ("validation", 13))):
        texts = [text for text, _ in made.sentences(rows, seed)]
        (folder / f"{split}.txt").write_bytes("\r\n".join(["", *texts, "  "]).encode())
        (folder / f"{split}.txt.gz").write_bytes(gzip.compress("\n".join(texts).encode()))
        made.write(folder / f"{split}.csv", [{"id": i, "body": text} for i, text in enumerate(texts)])
        made.write(folder / f"{split}.jsonl.gz", [{"translation": {"en": text, "de": "das"}} for text in texts])
        found[split] = texts
    return folder, found


def arguments(tmp_path, files, model, *more, name="{split}.txt", steps="do_train do_eval"):
    folder, _ = files
    data = [f"--{split}_file={folder / name.format(split=split)}" for split in ("train", "validation")]
    flags = [f"--{step}" for step in steps.split()]
    limit = [] if "--num_train_epochs" in more else ["--max_steps=3"]
    return [*data, f"--model_name_or_path={model}", f"--output_dir={tmp_path / 'out'}", "--block_size=16", *flags,
            *QUICK, *limit, *map(str, more)]  # fmt: skip


def data_args(**options):
    return language_modelling.ClmArguments(train_file="x.txt", **options)


# ---- Tokens and blocks ----


def test_tokens_follow_each_other_with_an_end_after_each_text():
    texts = ["the film was good", "  ", "a book", "", "it"]
    expected = []
    for text in texts:
        words = [made.make_tokenizer().convert_tokens_to_ids(word) for word in text.split()]
        expected += [*words, SEP] if words else []
    for template in (True, False):  # [CLS] text [SEP], and text [SEP]: the end is there already
        tokenizer = made.make_tokenizer(pair_template=template)
        found = language_modelling.tokenize(Dataset.from_dict({"text": texts}), "train", tokenizer, data_args())
        assert [token for token in found.tolist() if token != CLS] == expected
        assert found.tolist().count(CLS) == 3 * template
    tokenizer.backend_tokenizer.post_processor = None  # a tokenizer that adds nothing, like GPT-2's
    found = language_modelling.tokenize(Dataset.from_dict({"text": texts}), "train", tokenizer, data_args())
    assert found.tolist() == expected
    found = language_modelling.tokenize(Dataset.from_dict({"text": texts}), "train", tokenizer, data_args(mlm=True))
    assert found.tolist() == [token for token in expected if token != SEP]


def test_tokens_of_more_texts_than_a_batch_are_complete():
    rows = Dataset.from_dict({"text": [text for text, _ in made.sentences(2500, 0)]})
    tokenizer = made.make_tokenizer(pair_template=False)
    expected = list(itertools.chain(*(tokenizer(text).input_ids for text in rows["text"])))
    assert language_modelling.tokenize(rows, "train", tokenizer, data_args()).tolist() == expected
    chosen = language_modelling.tokenize(rows.select([7, 3]), "train", tokenizer, data_args()).tolist()
    assert chosen == tokenizer(rows[7]["text"]).input_ids + tokenizer(rows[3]["text"]).input_ids


@pytest.mark.parametrize(("count", "size"), [(12, 4), (13, 4), (15, 4), (3, 8), (1, 2), (5, 5)])
def test_blocks_are_those_of_a_naive_loop(count, size):
    tokens, rows = list(range(10, 10 + count)), []
    for token in tokens:
        if not rows or len(rows[-1]) == size:
            rows.append([])
        rows[-1].append(token)
    expected = {"input_ids": [], "attention_mask": [], "labels": []}
    for row in rows:
        rest = size - len(row)
        expected["input_ids"].append(row + rest * [PAD])
        expected["attention_mask"].append(len(row) * [1] + rest * [0])
        expected["labels"].append(row + rest * [-100])
    assert language_modelling.cut(np.array(tokens), size, PAD).to_dict() == expected


def test_the_end_is_learnt_even_if_it_is_also_the_padding():
    """The example of Transformers leaves out every label that is the padding token."""
    blocks = language_modelling.cut(np.array([5, 6, SEP, 7, SEP]), 4, pad=SEP)
    batch = language_modelling.BlockCollator(made.make_tokenizer(), data_args(), seed=0)(list(blocks))
    assert batch["labels"].tolist() == [[5, 6, SEP, 7], [SEP, -100, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]


# ---- Scores ----


def naive_scores(model, tokens, size):
    """Loss and hit of every token that has one before it in its block, one block at a time in float64."""
    model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
    losses, hits = [], []
    for start in range(0, len(tokens), size):
        block = tokens[start : start + size]
        for place in range(1, len(block)):
            with torch.no_grad():
                scores = model(torch.tensor([block[:place]])).logits[0, -1]
            log_p = (scores.exp() / scores.exp().sum()).log()
            losses.append(-float(log_p[block[place]]))
            hits.append(int(log_p.argmax()) == block[place])
    return losses, hits


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_perplexity_is_that_of_all_tokens_alike(tmp_path, decoder, files, batch_size):
    _, texts = files
    tokenizer = AutoTokenizer.from_pretrained(decoder)
    tokens = list(itertools.chain(*(tokenizer(text).input_ids for text in texts["validation"])))
    losses, hits = naive_scores(decoder, tokens, 16)
    assert len(tokens) % 16 not in (0, 1)  # the last block is shorter
    found = run_clm.main(
        arguments(tmp_path, files, decoder, "--per_device_eval_batch_size", batch_size, steps="do_eval")
    )
    assert found["eval_nll"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert found["eval_perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert found["eval_accuracy"] == pytest.approx(sum(hits) / len(hits))
    assert found["eval_samples"] == math.ceil(len(tokens) / 16)
    # Trainer's own loss weighs the short block as if it were full
    assert abs(math.exp(found["eval_loss"]) / found["eval_perplexity"] - 1) > 1e-4


@pytest.mark.parametrize("shift", [True, False])
def test_sums_of_tokens_with_labels_left_out(shift):
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 5, 7), torch.randint(0, 7, (3, 5))
    labels[0, 2:], labels[2] = -100, -100
    expected = []
    for row in range(3):
        sums = [0.0, 0, 0]
        for place in range(5):
            target = place + shift
            if target < 5 and labels[row, target] != -100:
                p = logits[row, place].double().softmax(0)
                sums[0] -= math.log(p[labels[row, target]])
                sums[1] += int(p.argmax() == labels[row, target])
                sums[2] += 1
        expected.append(sums)
    for given in (logits, (logits, "cache")):
        torch.testing.assert_close(language_modelling.token_sums(shift)(given, labels), torch.tensor(expected))
    nll, hits, count = np.array(expected).sum(0)
    scores = language_modelling.score_tokens(EvalPrediction(np.array(expected), None))
    assert scores == pytest.approx({"nll": nll / count, "perplexity": math.exp(nll / count), "accuracy": hits / count})
    assert language_modelling.score_tokens(EvalPrediction(np.array([[1e4, 0, 1]]), None))["perplexity"] == math.inf


# ---- Masks ----


def masking(seed=0, probability=0.15):
    return language_modelling.BlockCollator(
        made.make_tokenizer(), data_args(mlm=True, mlm_probability=probability), seed=seed
    )


def test_shares_of_masked_tokens():
    ids = np.random.default_rng(0).integers(5, 60, (40, 256))
    ids[:, ::8] = SEP
    batch = masking()([{"input_ids": row.tolist()} for row in ids])
    masked, labels, before = batch["input_ids"], batch["labels"], torch.tensor(ids)
    chosen = labels != -100
    assert torch.equal(labels[chosen], before[chosen]) and torch.equal(masked[~chosen], before[~chosen])
    assert not chosen[:, ::8].any()  # special tokens
    assert chosen.float().mean().item() * 8 / 7 == pytest.approx(0.15, abs=0.015)
    assert (masked[chosen] == MASK).float().mean().item() == pytest.approx(0.8, abs=0.05)
    assert (masked[chosen] == before[chosen]).float().mean().item() == pytest.approx(0.1, abs=0.04)


def test_masks_depend_on_seed_epoch_and_block_alone():
    rows = [{"input_ids": list(range(5 + i, 45 + i))} for i in range(6)]
    collator = masking()
    first = collator(rows)["input_ids"]
    torch.rand(1)
    assert torch.equal(collator(rows)["input_ids"], first)
    assert torch.equal(masking()(rows[::-1])["input_ids"], first.flip(0))
    assert not torch.equal(masking(seed=1)(rows)["input_ids"], first)
    collator.on_epoch_begin(None, SimpleNamespace(epoch=1.0), None)
    assert not torch.equal(collator(rows)["input_ids"], first)
    state = torch.get_rng_state()
    collator(rows)
    assert torch.equal(torch.get_rng_state(), state)  # dropout's masks do not depend on it


def test_both_passes_see_the_same_masked_tokens_and_epochs_do_not(tmp_path, encoder, files):
    seen = []

    def train(trainer):
        def keep(module, args, kwargs):
            if module.training:
                seen.append(dict(kwargs))

        trainer.model.register_forward_pre_hook(keep, with_kwargs=True)
        trainer.train()
        return {}

    run_clm.main(
        arguments(tmp_path, files, encoder, "--mlm", "--rdrop_alpha=1", "--num_train_epochs", 2, steps="do_train"),
        use_trainer=train,
    )
    blocks = [{}, {}]
    steps = [batch for batch in seen if len(batch["input_ids"]) % 2 == 0 and batch.get("labels") is not None]
    assert len(steps) >= 4
    for number, batch in enumerate(steps):
        ids, labels = batch["input_ids"], batch["labels"]
        half = len(ids) // 2
        assert torch.equal(ids[:half], ids[half:]) and torch.equal(labels[:half], labels[half:])
        assert (ids == MASK).any()
        for row, label in zip(ids[:half], labels[:half], strict=True):
            blocks[2 * number // len(steps)][tuple(torch.where(label == -100, row, label).tolist())] = row.tolist()
    common = blocks[0].keys() & blocks[1].keys()
    assert len(common) > 5 and any(blocks[0][block] != blocks[1][block] for block in common)


def test_masks_of_the_validation_data_are_always_the_same(tmp_path, encoder, files):
    more = ("--mlm", "--per_device_eval_batch_size")
    first = run_clm.main(arguments(tmp_path / "a", files, encoder, *more, 2, "--seed=1", steps="do_eval"))
    # (The new head is drawn by the seed; a saved one makes the scores comparable.)
    saved = run_clm.main(arguments(tmp_path / "b", files, encoder, *more, 2, "--eval_strategy=epoch"))
    model = tmp_path / "b" / "out"
    again = [
        run_clm.main(arguments(tmp_path / f"c{seed}", files, model, *more, size, f"--seed={seed}", steps="do_eval"))
        for seed, size in ((1, 2), (2, 5))
    ]
    assert again[0]["eval_nll"] == pytest.approx(again[1]["eval_nll"], rel=1e-5)
    assert again[0]["eval_nll"] == pytest.approx(saved["eval_nll"], rel=1e-5)
    assert 1 < first["eval_perplexity"] < 1e4


def test_a_resumed_run_masks_as_the_uninterrupted_one(tmp_path, encoder, files):
    more = ("--mlm", "--rdrop_alpha=1", "--max_steps=6", "--save_steps=2", "--num_train_epochs", 2)
    more += ("--per_device_train_batch_size=4",)
    run_clm.main(arguments(tmp_path, files, encoder, *more, steps="do_train"))
    expected = load_file(tmp_path / "out" / "model.safetensors")
    for step in (4, 6):
        for file in (tmp_path / "out" / f"checkpoint-{step}").iterdir():
            file.unlink()
        (tmp_path / "out" / f"checkpoint-{step}").rmdir()
    run_clm.main(arguments(tmp_path, files, encoder, *more, "--resume_from_checkpoint=last", steps="do_train"))
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


# ---- Runs ----


@pytest.mark.parametrize(
    ("name", "more", "alpha"),
    [
        ("{split}.txt", [], 0),
        ("{split}.txt", [], 1),
        ("{split}.jsonl.gz", ["--text_column", "translation.en"], 1),
    ],
)
def test_run(tmp_path, decoder, files, name, more, alpha):
    folder, _ = files
    test = folder / name.format(split="validation")
    more = [*more, "--rdrop_alpha", alpha, f"--test_file={test}"]
    returned = run_clm.main(arguments(tmp_path, files, decoder, *more, name=name, steps="do_train do_eval do_predict"))
    out = tmp_path / "out"
    assert json.loads((out / "all_results.json").read_text()) == returned
    for metric in ("loss", "nll", "perplexity", "accuracy"):
        assert returned[f"predict_{metric}"] == returned[f"eval_{metric}"]
    steps = [line for line in json.loads((out / "trainer_state.json").read_text())["log_history"] if "loss" in line]
    assert len(steps) == 3 and all((line["kl_loss"] > 0) == (alpha > 0) for line in steps)
    assert all(abs(line["loss"] - line["ce_loss"] - alpha / 2 * line["kl_loss"]) < 1e-4 for line in steps)
    card = (out / "README.md").read_text()
    assert "AutoModelForCausalLM" in card and ("r-drop" in card.split("---")[1]) == (alpha > 0)


def test_all_formats_hold_the_same_texts(tmp_path, decoder, files):
    names = {"{split}.txt": [], "{split}.txt.gz": [], "{split}.csv": ["body"], "{split}.jsonl.gz": ["translation.en"]}
    found = set()
    for number, (name, column) in enumerate(names.items()):
        more = ["--text_column", *column] if column else []
        metrics = run_clm.main(arguments(tmp_path / str(number), files, decoder, *more, name=name, steps="do_eval"))
        found.add(metrics["eval_nll"])
    assert len(found) == 1


def test_from_scratch_and_on(tmp_path, files):
    """init_model.py's decoder learns, and what run_clm.py saved is where it goes on."""
    folder, _ = files
    sizes = ["--vocab_size=400", "--hidden_size=16", "--num_layers=1", "--num_heads=2", "--max_length=32"]
    new = ["--architecture=decoder", f"--train_files={folder / 'train.txt'}", f"--output_dir={tmp_path / 'new'}"]
    model = init_model.main([*new, *sizes])
    before = run_clm.main(arguments(tmp_path / "a", files, model, steps="do_eval"))["eval_perplexity"]
    after = run_clm.main(arguments(tmp_path / "b", files, model, "--num_train_epochs", 8, "--rdrop_alpha=1"))
    assert after["eval_perplexity"] < before / 2
    again = run_clm.main(arguments(tmp_path / "c", files, tmp_path / "b" / "out", "--learning_rate=1e-9"))
    assert again["eval_perplexity"] == pytest.approx(after["eval_perplexity"], rel=1e-4)


def test_masked_language_model_and_consistency(tmp_path, encoder, files):
    more = ("--mlm", "--rdrop_alpha=1", "--consistency_samples=2", "--mlm_probability=0.3")
    found = run_clm.main(arguments(tmp_path, files, encoder, *more))
    assert found["eval_consistency_loss_off"] == pytest.approx(found["eval_nll"], rel=1e-5)
    assert found["eval_consistency_accuracy_off"] == pytest.approx(found["eval_accuracy"])
    assert "AutoModelForMaskedLM" in (tmp_path / "out" / "README.md").read_text()


def test_rows_are_texts(tmp_path, decoder, files):
    seen = {}

    def look(trainer):
        seen.update(train=len(trainer.train_dataset), validation=len(trainer.eval_dataset))
        return {}

    more = ("--max_train_samples=20", "--validation_from_train=0.25", "--block_size=2")
    run_clm.main(arguments(tmp_path, files, decoder, *more), use_trainer=look)
    tokens = sum(len(text.split()) + 1 for text in files[1]["train"][:20])
    assert tokens <= 2 * (seen["train"] + seen["validation"]) <= tokens + 2
    assert 2 < seen["train"] / seen["validation"] < 4.5


# ---- What is refused ----


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--block_size=1"], "--block_size must be at least 2"),
        (["--mlm_probability=1"], "--mlm_probability must be between 0 and 1"),
        (["--text_column=txet"], r"no column 'txet' \(did you mean 'text'\?\)"),
        (["--text_column=text.en"], r"no column 'text.en'"),
        (["--mlm", "--validation_file={empty}"], "is empty"),
        (["--validation_file={blank}"], "is empty"),
        (["--validation_file={blanks}"], "validation data hold no text"),
        (["--validation_file={two}"], "unclear which column of the train data|no column 'text'"),
        (["--train_file={two}"], "unclear which column of the train data holds the texts.*a, b"),
        (["--validation_file={numbers}", "--text_column=text"], "row 2 .*which is no text"),
        (
            ["--model_name_or_path={encoder}", "--mlm", "--mlm_probability=0.001", "--validation_file={one}"],
            "validation data leave no token to predict: they are 3 tokens.*a higher --mlm_probability",
        ),
        (["--mlm"], "needs a tokenizer with a mask token|none of that type with a masked language modelling head"),
        (["--model_name_or_path={encoder}"], "bert model sees the whole text.*Give --mlm"),
        (["--model_name_or_path={seq2seq}"], "marian model has an encoder and a decoder.*run_translation.py"),
        (["--model_name_or_path={endless}"], "no end-of-sequence token"),
        (["--model_name_or_path={small}"], "model has only 20 embeddings"),
    ],
)
def test_refused_without_a_trace(tmp_path, decoder, encoder, files, more, message):
    places = {"encoder": encoder}
    for name, text in {"empty": "", "blank": " \n\n", "one": "the"}.items():
        (tmp_path / f"{name}.txt").write_text(text)
        places[name] = tmp_path / f"{name}.txt"
    for name, rows in {
        "blanks": [{"text": " "}, {"text": ""}],
        "two": [{"a": "x", "b": "y"}],
        "numbers": [{"text": "x"}, {"text": None}],
    }.items():
        places[name] = made.write(tmp_path / f"{name}.jsonl", rows)
    places["seq2seq"] = made.make_seq2seq(tmp_path / "seq2seq") if "seq2seq" in more[-1] else ""
    if "endless" in more[-1]:
        places["endless"] = made.make_decoder(tmp_path / "endless")
        tokenizer = made.make_tokenizer()
        tokenizer.eos_token = None
        tokenizer.save_pretrained(tmp_path / "endless")
    if "small" in more[-1]:
        # Ids beyond the number of tokens: a vocabulary with gaps, whose tokens `load_model` cannot count.
        places["small"] = made.make_decoder(tmp_path / "small", vocab_size=20)
        state = json.loads((tmp_path / "small" / "tokenizer.json").read_text())
        words = {"the", "film", "of", "it"}
        state["model"]["vocab"] = {t: i for t, i in state["model"]["vocab"].items() if i < 5 or t in words}
        (tmp_path / "small" / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=message):
        run_clm.main(arguments(tmp_path, files, decoder, *(item.format(**places) for item in more)))
    assert not (tmp_path / "out").exists()


def test_a_block_size_beyond_the_model_is_cut_with_a_warning(tmp_path, decoder, files, caplog):
    found = run_clm.main(arguments(tmp_path, files, decoder, "--block_size=9999", steps="do_eval"))
    tokens = sum(len(text.split()) + 1 for text in files[1]["validation"])
    assert "--block_size 9999 is more than the model can take: using 48" in caplog.text
    assert found["eval_samples"] == math.ceil(tokens / 48)


def test_a_causal_bert_is_accepted():
    tokenizer = made.make_tokenizer()
    language_modelling.check_model(
        SimpleNamespace(model_type="bert", is_decoder=True, is_encoder_decoder=False), tokenizer, False
    )
    language_modelling.check_model(GPT2Config(), tokenizer, False)
    with pytest.raises(ValueError, match="Give --mlm"):
        language_modelling.check_model(
            SimpleNamespace(model_type="roberta", is_decoder=False, is_encoder_decoder=False), tokenizer, False
        )


def test_a_metric_that_no_evaluation_will_have_is_refused_at_the_start(tmp_path, files, decoder):
    more = ["--eval_strategy=epoch", "--metric_for_best_model"]
    with pytest.raises(ValueError, match=r"bleu: .*no such metric.*loss, nll, perplexity, accuracy"):
        run_clm.main(arguments(tmp_path, files, decoder, *more, "bleu"))
    assert not (tmp_path / "out").exists()
    run_clm.main(arguments(tmp_path, files, decoder, *more, "perplexity"))
