"""run_contrastive.py on tiny models: its loss and correlations by hand, the saved model, resuming, refusals."""

import gzip
import json
import math
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from scipy import stats
from transformers import AutoModel, AutoTokenizer, GPT2Config, GPT2Model, set_seed

import run_contrastive
from finetuning.command_line import cli
from support import script_data as made
from support.hub_server import Hub, use_hub
from tasks.embeddings import ContrastiveArguments, load_sentences
from tasks.embeddings_trainer import ContrastiveTrainer

QUICK = ["--use_cpu", "--disable_tqdm=true", "--logging_steps=1", "--learning_rate=1e-3", "--save_strategy=no"]
BATCH = 4


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    set_seed(1)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 48, "bos_token_id": 2, "eos_token_id": 3}
    causal = GPT2Model(GPT2Config(vocab_size=len(made.make_tokenizer()), initializer_range=0.2, **sizes))
    causal.save_pretrained(folder / "causal")
    tokenizer = made.make_tokenizer(pair_template=False)
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(folder / "causal")
    return {
        "encoder": made.make_encoder(folder / "encoder"),
        "no dropout": made.make_encoder(folder / "no-dropout", dropout=0.0),
        "causal": str(folder / "causal"),
        "seq2seq": made.make_seq2seq(folder / "seq2seq"),
    }


def pairs(rows=11, seed=5):
    """Sentences that are alike in so many of their words, and some that are long."""
    texts = [text for text, _ in made.sentences(2 * rows, seed)]
    both = zip(texts[::2], texts[1::2], strict=True)
    return [
        {"sentence1": a, "sentence2": b, "score": len({*a.split()} & {*b.split()}) + 0.25 * (i % 3)}
        for i, (a, b) in enumerate(both)
    ]


def arguments(folder, model, *more, train="", validation="", out="out", steps="do_train do_eval"):
    if not train:
        train = folder / "train.txt"
        train.write_text("".join(f"{text}\n" for text, _ in made.sentences(14, 0)))
    validation = validation or made.write(folder / "sts.jsonl", pairs())
    options = {"train_file": train, "validation_file": validation, "model_name_or_path": model}
    options |= {"output_dir": folder / out, "per_device_train_batch_size": BATCH}
    return [*(f"--{k}={v}" for k, v in options.items()), *(f"--{s}" for s in steps.split()), *QUICK, *more]


def read(folder, name="all_results.json"):
    return json.loads((folder / "out" / name).read_text())


def losses(folder):
    return [entry["loss"] for entry in read(folder, "trainer_state.json")["log_history"] if "loss" in entry]


def embed_alone(folder, text, pooling):
    """One sentence by itself, without padding, pooled by hand."""
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].double()
    return {"cls": hidden[0], "mean": sum(hidden) / len(hidden), "last": hidden[-1]}[pooling]


def correlations_by_hand(folder, rows, pooling):
    found = []
    for row in rows:
        a, b = (embed_alone(folder, row[name], pooling) for name in ("sentence1", "sentence2"))
        found.append((a @ b / a.norm() / b.norm()).item())
    scores = [row["score"] for row in rows]
    return {
        "spearmanr": stats.spearmanr(found, scores).statistic,
        "pearson": stats.pearsonr(found, scores).statistic,
    }


# ---- What it computes ----


@pytest.mark.parametrize(("model", "pooling"), [("encoder", "cls"), ("encoder", "mean"), ("causal", "last")])
def test_correlations_before_and_after_are_those_by_hand(tmp_path, models, model, pooling):
    returned = run_contrastive.main(arguments(tmp_path, models[model], f"--pooling={pooling}", "--max_steps=5"))
    assert read(tmp_path) == json.loads(json.dumps(returned))
    before = correlations_by_hand(models[model], pairs(), pooling)
    after = correlations_by_hand(tmp_path / "out", pairs(), pooling)
    for name in ("spearmanr", "pearson"):
        assert returned[f"eval_{name}_before"] == pytest.approx(before[name], abs=1e-5)
        assert returned[f"eval_{name}"] == pytest.approx(after[name], abs=1e-5)
    assert abs(before["pearson"] - after["pearson"]) > 1e-3
    assert returned["eval_samples"] == 11  # the last rows count, though training leaves its last batch out
    assert all(math.isfinite(value) for value in returned.values())
    assert set(read(tmp_path, "eval_results.json")) >= {"eval_spearmanr", "eval_spearmanr_before"}


@pytest.mark.parametrize("head", [False, True])
def test_the_loss_is_simcses_over_the_model_in_training(tmp_path, models, monkeypatch, head):
    """Each logged loss is that of the two halves of one forward, computed by loops; and the halves differ."""
    seen = []
    compute_loss = ContrastiveTrainer.compute_loss

    def remember(self, *args, **kwargs):
        loss, outputs = compute_loss(self, *args, **{**kwargs, "return_outputs": True})
        seen.append(outputs["embeddings"].detach().double())
        return loss

    monkeypatch.setattr(ContrastiveTrainer, "compute_loss", remember)
    more = ["--max_steps=3", "--temperature=0.2", *(["--mlp_head"] if head else [])]
    run_contrastive.main(arguments(tmp_path, models["encoder"], *more))
    assert len(seen) == len(losses(tmp_path)) == 3
    for embeddings, logged in zip(seen, losses(tmp_path), strict=True):
        assert embeddings.shape == (2 * BATCH, 16) and (embeddings.abs().max() <= 1 or not head)
        a, b = embeddings.split(BATCH)
        assert (a - b).abs().max() > 1e-3
        total = 0.0
        for i in range(BATCH):
            scores = [(a[i] @ row / a[i].norm() / row.norm()).item() / 0.2 for row in b]
            total += math.log(sum(map(math.exp, scores))) - scores[i]
        assert logged == pytest.approx(total / BATCH, rel=1e-4)


def test_training_lowers_the_loss_and_moves_the_weights(tmp_path, models):
    run_contrastive.main(arguments(tmp_path, models["encoder"], "--num_train_epochs=12"))
    steps = losses(tmp_path)
    assert len(steps) == 12 * 3  # 14 rows: three batches of 4, and 2 rows left out
    assert sum(steps[-6:]) < 0.7 * sum(steps[:6])
    old, new = (load_file(Path(folder) / "model.safetensors") for folder in (models["encoder"], tmp_path / "out"))
    moved = {name for name in old if not old[name].equal(new[name])}
    still = {name for name in old if name not in moved}
    assert all("pooler" in name or "position" in name for name in still), still


def test_accumulated_gradients_are_the_mean_over_micro_batches(tmp_path, models, monkeypatch):
    seen = []
    compute_loss = ContrastiveTrainer.compute_loss

    def remember(self, model, inputs, **kwargs):
        seen.append({name: tensor.clone() for name, tensor in inputs.items()})
        return compute_loss(self, model, inputs, **kwargs)

    monkeypatch.setattr(ContrastiveTrainer, "compute_loss", remember)
    more = ["--max_steps=1", "--dropout=1e-9", "--gradient_accumulation_steps=3"]  # so little that nothing is dropped
    run_contrastive.main(arguments(tmp_path, models["encoder"], *more, steps="do_train"))
    logged = read(tmp_path, "trainer_state.json")["log_history"][0]

    assert len(seen) == 3
    model = AutoModel.from_pretrained(models["encoder"]).eval()
    total = 0.0
    for inputs in seen:
        rows = torch.nn.functional.normalize(model(**inputs).last_hidden_state[:, 0], dim=-1)
        total = total + torch.nn.functional.cross_entropy(rows @ rows.T / 0.05, torch.arange(BATCH)) / 3
    total.backward()
    norm = sum((p.grad**2).sum() for p in model.parameters() if p.grad is not None).sqrt().item()
    assert (logged["loss"], logged["grad_norm"]) == pytest.approx((total.item(), norm), rel=1e-4)


def test_evaluating_changes_no_training_and_two_runs_are_the_same(tmp_path, models):
    weights = []
    for out, steps in (("a", "do_train do_eval"), ("b", "do_train do_eval"), ("c", "do_train")):
        run_contrastive.main(arguments(tmp_path, models["encoder"], "--max_steps=3", out=out, steps=steps))
        weights.append(load_file(tmp_path / out / "model.safetensors"))
    run_contrastive.main(arguments(tmp_path, models["encoder"], "--max_steps=3", "--seed=7", out="d"))
    for other in weights[1:]:
        assert all(tensor.equal(other[name]) for name, tensor in weights[0].items())
    seeded = load_file(tmp_path / "d" / "model.safetensors")
    assert any(not tensor.equal(seeded[name]) for name, tensor in weights[0].items() if "pooler" not in name)


@pytest.mark.parametrize("head", [False, True])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, models, head):
    more = ["--num_train_epochs=2", "--save_steps=2", "--save_strategy=steps", "--logging_steps=4"]
    more += ["--train_sampling_strategy=group_by_length", *(["--mlp_head"] if head else [])]
    run_contrastive.main(arguments(tmp_path, models["encoder"], *more))
    whole, logged = load_file(tmp_path / "out" / "model.safetensors"), losses(tmp_path)
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert any("head" in name for name in load_file(checkpoint / "model.safetensors")) == head
    argv = arguments(tmp_path, models["encoder"], *more, f"--resume_from_checkpoint={checkpoint}", out="again")
    run_contrastive.main(argv)
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert whole.keys() == again.keys() and all(tensor.equal(again[name]) for name, tensor in whole.items())
    state = json.loads((tmp_path / "again" / "trainer_state.json").read_text())
    assert [entry["loss"] for entry in state["log_history"] if "loss" in entry] == logged


def test_the_best_checkpoint_by_spearman(tmp_path, models):
    more = ["--max_steps=4", "--eval_strategy=steps", "--eval_steps=1", "--save_strategy=steps", "--save_steps=1"]
    more += ["--load_best_model_at_end", "--metric_for_best_model=spearmanr", "--mlp_head"]
    returned = run_contrastive.main(arguments(tmp_path, models["encoder"], *more))
    history = read(tmp_path, "trainer_state.json")["log_history"]
    seen = [entry["eval_spearmanr"] for entry in history if "eval_spearmanr" in entry]
    assert len(seen) == 5 and returned["eval_spearmanr"] == pytest.approx(max(seen[:4]))


# ---- What it saves ----


def test_the_saved_model_is_a_stock_encoder_with_a_card_whose_code_runs(tmp_path, models, capsys):
    run_contrastive.main(arguments(tmp_path, models["encoder"], "--max_steps=2", "--mlp_head", "--pooling=cls"))
    folder = tmp_path / "out"
    _, loading = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert (
        load_file(folder / "model.safetensors").keys()
        == load_file(Path(models["encoder"], "model.safetensors")).keys()
    )
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["BertModel"]
    card = ModelCard.load(folder / "README.md")
    assert "simcse" in card.data.tags and "r-drop" not in card.data.tags
    assert str(tmp_path) not in card.content and "| Spearman's |" in card.content
    capsys.readouterr()
    code = card.content.split("```python\n")[1].split("```")[0].replace("'out'", repr(str(folder)))
    exec(code, {})
    a, b = (embed_alone(folder, text, "cls") for text in ("A sentence.", "Another one."))
    similarity = (a @ b / a.norm() / b.norm()).item()
    assert f"{similarity:.2f}"[:4] in capsys.readouterr().out


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_the_cards_code_pools_as_training_did(tmp_path, models, pooling):
    model = models["causal" if pooling == "last" else "encoder"]
    run_contrastive.main(arguments(tmp_path, model, "--max_steps=1", f"--pooling={pooling}"))
    code = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    found = {}
    exec(code.replace("'out'", repr(str(tmp_path / "out"))), found)
    for row, text in enumerate(("A sentence.", "Another one.")):
        alone = embed_alone(tmp_path / "out", text, pooling)
        torch.testing.assert_close(found["embeddings"][row].double(), alone / alone.norm(), rtol=0, atol=1e-5)


def test_evaluation_alone(tmp_path, models):
    returned = run_contrastive.main(arguments(tmp_path, models["encoder"], steps="do_eval"))
    expected = correlations_by_hand(models["encoder"], pairs(), "cls")
    assert returned["eval_spearmanr"] == pytest.approx(expected["spearmanr"], abs=1e-5)
    assert not any(name.endswith("_before") for name in returned)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_push_brings_the_stock_model_and_no_path(tmp_path, models, monkeypatch):
    with Hub() as hub:
        use_hub(hub, tmp_path / "cache", monkeypatch)
        more = ["--max_steps=2", "--mlp_head", "--push_to_hub", "--hub_model_id=tester/model"]
        run_contrastive.main(arguments(tmp_path, models["encoder"], *more))
        files = hub.files("tester/model")
    assert files["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()
    assert {"README.md", "config.json", "tokenizer.json", "all_results.json"} <= files.keys()
    assert b"AutoModel.from_pretrained('tester/model')" in files["README.md"]
    assert not any(str(tmp_path).encode() in content for content in files.values())


# ---- Data ----


@pytest.mark.parametrize(
    ("name", "column", "others"),
    [
        ("train.txt", None, []),
        ("train.txt.gz", None, []),
        ("train.csv", "text", ["id", "title"]),
        ("train.jsonl", "sentence", ["title"]),
        ("train.jsonl.gz", "words", []),
        ("train.tsv", "asked", ["text"]),
    ],
)
def test_sentences_from_each_kind_of_file(tmp_path, name, column, others):
    texts, file = [text for text, _ in made.sentences(6, 0)], tmp_path / name
    content = ("\n\n".join(texts) + "\n  \n").encode()  # empty lines are no sentences
    if column:
        made.write(file, [{**dict.fromkeys(others, "x"), column: text} for text in texts])
    else:
        file.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    options = {"text_column": column} if column == "asked" else {}
    data_args = ContrastiveArguments(train_file=str(file), max_train_samples=5, **options)
    assert load_sentences(data_args, None).to_dict() == {"text": texts[:5]}


def test_a_data_set_of_the_hub_gives_both_splits(tmp_path, models, monkeypatch):
    rows = datasets.Dataset.from_list([{"text": text} for text, _ in made.sentences(9, 0)])
    sts = datasets.Dataset.from_list(pairs())
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: {"train": rows, "validation": sts})
    argv = arguments(tmp_path, models["encoder"], "--dataset_name=owner/sentences", "--max_steps=1")
    returned = run_contrastive.main([item for item in argv if not item.startswith(("--train_file", "--validation"))])
    assert returned["train_samples"] == 9 and returned["eval_samples"] == 11
    assert ModelCard.load(tmp_path / "out" / "README.md").data.datasets == ["owner/sentences"]


def test_scores_may_be_text_or_whole_numbers_of_any_column(tmp_path, models):
    values = []
    for name, kind in (("a.csv", str), ("b.jsonl", lambda score: round(4 * score)), ("c.json", lambda score: score)):
        rows = [{"x": r["sentence1"], "y": r["sentence2"], "label": kind(r["score"])} for r in pairs()]
        more = ["--pair_columns", "x", "y", "--score_column=label"]
        file = made.write(tmp_path / name, rows)
        argv = arguments(tmp_path, models["encoder"], *more, validation=file, out=f"out-{name}", steps="do_eval")
        values.append(run_contrastive.main(argv)["eval_spearmanr"])
    assert values == pytest.approx([values[0]] * 3)


# ---- Refusals ----


def refused(folder, capsys, model, *more, **kwargs):
    """The one message of a run that ends before it began, with nothing on disk."""
    with pytest.raises(SystemExit) as stop:
        cli(lambda: run_contrastive.main(arguments(folder, model, "--max_steps=1", *more, **kwargs)))
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(errors) == 1
    assert not (folder / "out").exists()
    return errors[0]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--temperature=0"], ["temperature", "> 0", "0.05"]),
        (["--temperature=nan"], ["temperature", "nan"]),
        (["--pooling=max"], ["--pooling", "'max'"]),
        (["--mlp_head", "--pooling=mean"], ["--mlp_head", "--pooling cls"]),
        (["--dropout=1.5"], ["1.5"]),
        (["--dropout=0"], ["would only push sentences apart", "--dropout 0.1"]),
        (["--label_smoothing_factor=0.1"], ["--label_smoothing_factor"]),
        (["--per_device_train_batch_size=1"], ["--per_device_train_batch_size 1", "negatives"]),
        (["--per_device_train_batch_size=64"], ["14 sentences fill no batch of 64"]),
        (["--no_dataloader_drop_last", "--per_device_train_batch_size=13"], ["leave one alone", "drop_last"]),
        (["--bf16_full_eval"], ["--bf16_full_eval", "before"]),
        (["--do_predict"], ["--do_predict", "nothing to predict"]),
        (["--dataset_name=a/b"], ["--dataset_name", "--train_file"]),
        (["--pair_columns", "a"], ["--pair_columns", "two"]),
        (["--max_seq_length=1"], ["--max_seq_length"]),
        (["--max_train_samples=0"], ["--max_train_samples"]),
        (["--max_eval_samples=1"], ["no correlation"]),
        (["--score_column=scroe"], ["no column 'scroe'", "did you mean 'score'", "--score_column"]),
        (["--temprature=1"], ["did you mean '--temperature'"]),
    ],
)
def test_arguments_that_cannot_work(tmp_path, capsys, models, more, words):
    message = refused(tmp_path, capsys, models["encoder"], *more)
    for word in words:
        assert word in message


def test_a_model_without_dropout_or_with_a_decoder_is_refused(tmp_path, capsys, models):
    message = refused(tmp_path, capsys, models["no dropout"])
    assert "hidden_dropout" in message or "dropout (dropout) = 0" in message
    assert "--dropout 0.1" in message and "embeddings" in message and "rdrop" not in message
    assert "encoder-decoder" in refused(tmp_path, capsys, models["seq2seq"])
    run_contrastive.main(arguments(tmp_path, models["no dropout"], "--dropout=0.1", "--max_steps=1"))
    assert read(tmp_path, "config.json")["hidden_dropout_prob"] == 0.1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: [{**r, "score": "high"} for r in rows], ["row 1", "'high'", "no number", "--score_column"]),
        (lambda rows: [*rows[:3], {**rows[3], "score": None}, *rows[4:]], ["row 4", "None"]),
        (lambda rows: [*rows[:3], {**rows[3], "score": math.nan}, *rows[4:]], ["row 4", "nan"]),
        (lambda rows: [{**r, "score": 2.5} for r in rows], ["all 11 scores", "2.5", "no correlation"]),
        (lambda rows: rows[:1], ["all 1 scores"]),
        (
            lambda rows: [{"sentence1": r["sentence1"], "score": r["score"]} for r in rows],
            ["'sentence2'", "pair_columns"],
        ),
        (lambda rows: [{**r, "sentence2": " " if i == 2 else "a"} for i, r in enumerate(rows)], ["row 3", "empty"]),
        (lambda rows: [{**r, "sentence1": 7} for r in rows], ["row 1", "sentence1", "no text"]),
    ],
)
def test_bad_pairs_are_refused_before_training(tmp_path, capsys, models, change, words):
    file = made.write(tmp_path / "bad.jsonl", change(pairs()))
    message = refused(tmp_path, capsys, models["encoder"], validation=file)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("no.txt", None, ["no.txt does not exist"]),
        ("empty.txt", "\n \n", ["empty.txt is empty", ".txt"]),
        ("rows.jsonl", '{"text": "a film"}\n{"text": ""}\n', ["row 2", "'text'", "empty"]),
        ("rows.csv", "a,b\nx,y\n", ["2 columns of text (a, b)", "--text_column"]),
        ("rows.jsonl", '{"a": 1}\n', ["0 columns of text"]),
        ("rows.xml", "<a/>", ["no known format", ".txt"]),
    ],
)
def test_bad_sentences_are_refused(tmp_path, capsys, models, name, content, words):
    if content is not None:
        (tmp_path / name).write_text(content)
    message = refused(tmp_path, capsys, models["encoder"], train=tmp_path / name)
    for word in words:
        assert word in message


def test_an_output_folder_in_use_is_left_alone(tmp_path, capsys, models):
    run_contrastive.main(arguments(tmp_path, models["encoder"], "--max_steps=1"))
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    with pytest.raises(ValueError, match="is not empty"):
        run_contrastive.main(arguments(tmp_path, models["encoder"], "--max_steps=1"))
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}


# ---- Two processes ----


@pytest.mark.slow
def test_two_processes_with_the_head(tmp_path, models):
    """The head lies within the model's forward, so that DDP synchronises it; all pairs are evaluated once."""
    argv = arguments(tmp_path, models["encoder"], "--max_steps=2", "--mlp_head", "--per_device_train_batch_size=3")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = run_contrastive.__file__
    done = subprocess.run([*launch, script, *argv], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, folder in (("_before", models["encoder"]), ("", tmp_path / "out")):
        expected = correlations_by_hand(folder, pairs(), "cls")
        assert read(tmp_path)[f"eval_spearmanr{name}"] == pytest.approx(expected["spearmanr"], abs=1e-5)


def test_a_metric_that_no_evaluation_will_have_is_refused_at_the_start(tmp_path, models):
    more = ["--eval_strategy=epoch", "--metric_for_best_model=accuracy", "--max_steps=2"]
    with pytest.raises(ValueError, match=r"accuracy: .*no such metric.*spearmanr"):
        run_contrastive.main(arguments(tmp_path, models["encoder"], *more))
    assert not (tmp_path / "out").exists()
