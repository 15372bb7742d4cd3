"""Model cards: metadata that huggingface_hub takes, a body without gaps, code that runs, nothing of this machine."""

import json
import math
import re
import socket
import sys
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    ASTFeatureExtractor,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Trainer,
    set_seed,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_rdrop import Consistency, RDropSeq2SeqTrainer, RDropTrainer
from hf_rdrop.cards.card import PLOT
from hf_rdrop.cards.evidence import read_comparison, read_consistency
from hf_rdrop.cards.facts import describe_head, dropout_rates
from hf_rdrop.cards.history import MAX_ROWS, curves_part, last_evaluation
from hf_rdrop.cards.markdown import inline, is_hub_id, number, public, table
from hf_rdrop.consistency import Score
from support import ROOT
from support.head_models import build, rows_of
from support.training import HEADS, make_model, make_rows, train

SHORT = ROOT / "model_cards" / "reference" / "short"
MORE = ("question", "choice", "image", "audio")  # heads of head_models.py
DATA = {"dataset_tags": "glue", "dataset": "GLUE MRPC", "dataset_args": "mrpc", "language": "en"}


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """They take most of the time: only for the tests that ask for the fixture `pictures`."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr("hf_rdrop.cards.card.plot_curves", lambda *_: False)


@pytest.fixture
def pictures():
    pass


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trainer for the tests that only ask it for cards."""
    return run(tmp_path_factory.mktemp("trained"))


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


# ---- Every head ----

OBJECTIVES = {
    "single": "(CE_1 + CE_2) / 2 + 1.5 * sKL(P_1, P_2)",
    "multi": "(BCE_1 + BCE_2) / 2 + 1.5 * sKL(P_1, P_2)",
    "regression": "(MSE_1 + MSE_2) / 2 + 1.5 * d(P_1, P_2)",
    "token": "(CE_1 + CE_2) / 2 + 1.5 * sKL(P_1, P_2)",
    "seq2seq": "(CE_1 + CE_2) / 2 + 1.5 * sKL(P_1, P_2)",
    "causal": "(CE_1 + CE_2) / 2 + 1.5 * sKL(P_1, P_2)",
    "masked": "(CE_1 + CE_2) / 2 + 1.5 * sKL(P_1, P_2)",
    **dict.fromkeys(MORE, "(CE_1 + CE_2) / 2 + 1.5 * sKL(P_1, P_2)"),
}
TASKS = {
    **{"token": "token-classification", "seq2seq": "text2text-generation", "causal": "text-generation"},
    **{"masked": "fill-mask", "question": "question-answering", "choice": "multiple-choice"},
    **{"image": "image-classification", "audio": "audio-classification"},
}
MEANS = {
    **{"multi": "the same rows and labels", "question": "the same answers (start and end)"},
    **dict.fromkeys(("token", "seq2seq", "causal", "masked"), "the same tokens"),
}


@pytest.mark.parametrize("head", [*HEADS, "causal", "masked", *MORE])
def test_every_head(head, tmp_path, capsys, monkeypatch):
    # (Where `transformers` asks for torchvision for Pillow's processors too: its oldest releases.)
    monkeypatch.setattr(transformers, "AutoImageProcessor", AutoImageProcessor)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (20, 10), "red").save("image.png")
    trainer = run(tmp_path, head, rdrop_alpha=3.0)
    trainer.state.log_history[-1]["eval_accuracy"] = 0.25
    trainer.save_model()
    text = card(trainer, **DATA)
    assert OBJECTIVES[head] in section(text, "R-Drop")
    assert "0.1 (" in section(text, "R-Drop") and MEANS.get(head, "the same rows") in section(text, "R-Drop")
    data = data_of(trainer)
    (result,) = data.eval_results
    assert result.task_type == TASKS.get(head, "text-classification")
    assert (result.dataset_type, result.dataset_name, result.dataset_config) == ("glue", "GLUE MRPC", "mrpc")
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.25)
    assert data.model_name == "model" and data.metrics == ["accuracy"] and data.library_name == "transformers"
    assert "r-drop" in data.tags and data.language in ("en", ["en"]) and data.datasets == ["glue"]
    assert "| accuracy | 0.25 |" in section(text, "Evaluation results")
    names, printed = run_usage(text, {"model": tmp_path / "model"}, capsys)
    assert printed.strip()
    assert type(names["model"]) is type(trainer.base_model)
    for ours, theirs in zip(names["model"].parameters(), trainer.base_model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("head", ["single", "token", "causal", "seq2seq"])
def test_adapters(head, tmp_path, capsys):
    base = make_language_model("causal") if head == "causal" else make_model(head)
    base.save_pretrained(tmp_path / "secret" / "base")
    base = type(base).from_pretrained(tmp_path / "secret" / "base")
    task = {"single": TaskType.SEQ_CLS, "token": TaskType.TOKEN_CLS, "causal": TaskType.CAUSAL_LM}.get(head)
    targets = {"causal": ["c_attn"], "seq2seq": ["q_proj"]}.get(head, ["query"])
    model = get_peft_model(base, LoraConfig(task_type=task or TaskType.SEQ_2_SEQ_LM, r=2, target_modules=targets))
    trainer = run(tmp_path, head, model)
    first = card(trainer, tags="mine")
    trainer.save_model()  # PEFT rewrites the card's metadata and looks for its version in the body
    text = card(trainer, tags="mine")
    assert text == first
    data = data_of(trainer)
    assert data.library_name == "peft" and data.base_model is None
    assert {"lora", "mine", "r-drop", "generated_from_trainer"} <= set(data.tags)
    assert "secret" not in text
    names, printed = run_usage(text, {"model": tmp_path / "model", "base": tmp_path / "secret" / "base"}, capsys)
    assert isinstance(names["model"], PeftModel) and printed.strip()
    inputs = {key: torch.tensor([make_rows("single")[0][key]]) for key in ("input_ids", "attention_mask")}
    if head == "single":
        with torch.no_grad():
            torch.testing.assert_close(names["model"](**inputs).logits, trainer.model.eval()(**inputs).logits)


def test_names_of_classes_are_in_an_adapters_code(tmp_path, capsys):
    model = make_model("single")
    model.config.id2label, model.config.label2id = {0: "no", 1: 'a "b"', 2: "c|d"}, {"no": 0, 'a "b"': 1, "c|d": 2}
    model.save_pretrained(tmp_path / "base")
    base = type(model).from_pretrained(tmp_path / "base")
    lora = LoraConfig(task_type=TaskType.SEQ_CLS, target_modules=["query"])
    trainer = run(tmp_path, "single", get_peft_model(base, lora))
    trainer.save_model()
    places = {"model": tmp_path / "model", "base": tmp_path / "base"}
    _, printed = run_usage(card(trainer), places, capsys)
    assert 'a "b"' in printed and "c|d" in printed


# ---- Metadata ----


def test_written_the_same_however_often(tmp_path):
    trainer, tags = run(tmp_path), ["mine", "r-drop"]
    first = card(trainer, tags=tags, comparison=SHORT / "comparison.json", **DATA)
    assert tags == ["mine", "r-drop"]
    assert card(trainer, tags=tags, comparison=SHORT / "comparison.json", **DATA) == first
    assert first.count("## R-Drop\n") == 1 and data_of(trainer).tags.count("r-drop") == 1
    # user tags of an earlier card stay, whatever form the new ones have
    assert "mine" in ModelCard(card(trainer)).data.tags
    assert {"mine", "other"} <= set(ModelCard(card(trainer, tags="other")).data.tags)
    assert ModelCard(card(trainer, "de", "mit", ["third"])).data.license == "mit"  # positional, as the base class


def test_a_baseline_is_not_tagged(tmp_path, pictures):
    trainer = run(tmp_path, rdrop_alpha=0.0)
    (tmp_path / "model" / "README.md").write_text("---\ntags: [r-drop, mine]\n---\n", "utf-8")
    text = card(trainer)
    assert "r-drop" not in data_of(trainer).tags and "mine" in data_of(trainer).tags
    assert "plain fine-tuning" in text and "sKL" not in text and not (tmp_path / "model" / PLOT).exists()


def test_without_a_step(tmp_path):
    trainer = run(tmp_path)
    trainer.state.global_step, trainer.state.log_history = 0, []
    text = card(trainer)
    assert "no training step" in text and "## Evaluation" not in text and "by epoch" not in text


def test_results_need_a_data_set_a_task_and_finite_scores(tmp_path):
    trainer = run(tmp_path)
    trainer.state.log_history[-1] |= {"eval_accuracy": math.nan, "eval_f1": 0.5, "eval_own|one": 1.0, "eval_bleu": "x"}
    card(trainer, **DATA)
    assert [result.metric_type for result in data_of(trainer).eval_results] == ["f1"]
    text = card(trainer)
    assert data_of(trainer).eval_results is None and "model-index" not in text
    assert "a data set that this card cannot name" in text
    assert data_of(trainer).metrics == ["f1"] and r"| own\|one | 1 |" in text
    card(trainer, dataset_tags=["glue", "imdb"], dataset=["GLUE", "IMDB"])  # which of them were they found on?
    assert data_of(trainer).eval_results is None and data_of(trainer).datasets == ["glue", "imdb"]


def test_data_sets_from_memory_have_no_name(tmp_path):
    datasets = pytest.importorskip("datasets")
    trainer = run(tmp_path)
    trainer.eval_dataset = datasets.Dataset.from_list(make_rows("single", 4))
    assert "data set that this card cannot name" in card(trainer) and data_of(trainer).datasets is None


def test_base_model_on_the_hub(tmp_path):
    trainer = run(tmp_path, hub_model_id="someone/rdrop-mrpc")
    trainer.model.config._name_or_path = "google-bert/bert-base-cased"
    text = card(trainer)
    assert data_of(trainer).base_model == "google-bert/bert-base-cased"
    assert "[google-bert/bert-base-cased](https://huggingface.co/google-bert/bert-base-cased), fine-tuned" in text
    assert 'name = "someone/rdrop-mrpc"' in text


@pytest.mark.parametrize(
    "name", ["a|b *c* [d](e) <f>", "--- : {x}", "ünïcode 模型", "'\"#&$`", "{{ 7 * 7 }}", "x\ny", "# title"]
)
def test_awkward_names(name, trained, monkeypatch):
    trainer = trained
    history = [*trained.state.log_history, {"step": 4, "eval_accuracy": 0.5, f"eval_{name}": 0.5}]
    monkeypatch.setattr(trained.state, "log_history", history)
    text = card(trainer, model_name=name, dataset=name, dataset_tags="glue", tags=[name])
    data = data_of(trainer)
    assert data.model_name == name and data.eval_results[0].dataset_name == name and name in data.tags
    assert len(re.findall(r"^# ", text, flags=re.MULTILINE)) == 1 and "49" not in section(text, "Evaluation results")
    rows = [line for line in section(text, "Evaluation results").splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {3}
    compile(re.search(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)[1], "card", "exec")


def test_nothing_of_this_machine(tmp_path, monkeypatch, pictures):
    home = tmp_path / "home" / "alice-of-this-machine"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USER", "alice-of-this-machine")
    make_model("single").save_pretrained(home / "base")
    model = type(make_model("single")).from_pretrained(home / "base")
    trainer = run(home, model=model, hub_token="hf_verysecrettoken", optim_args=f"a={home}/optim")
    comparison = json.loads((SHORT / "comparison.json").read_text("utf-8"))
    for run_ in comparison["runs"]:
        run_["arguments"] += ["--train_file", f"{home}/train.csv"]
    given = {"tags": [f"base_model:adapter:{home}/base", f"{home}/tag"], "dataset_args": f"{home}/args"}
    for _ in range(2):
        text = card(
            trainer,
            model_name=f"{home}/model",
            finetuned_from=f"{home}/base",
            dataset=f"{home}/data.csv",
            dataset_tags=f"{home}/data.csv",
            comparison=(comparison, "mrpc"),
            **given,
        )
    for secret in ("alice", str(tmp_path), str(Path.cwd()), "hf_verysecrettoken", socket.gethostname() + "."):
        assert secret not in text
    assert "`base`" in text and "data.csv" in text and "# model\n" in text
    assert (home / "model" / PLOT).is_file()
    assert b"alice" not in (home / "model" / PLOT).read_bytes()


def test_broken_front_matter_is_refused(tmp_path):
    trainer = run(tmp_path)
    readme = tmp_path / "model" / "README.md"
    for broken in ("---\ntags: [a\n---\n", "---\n- a\n---\n"):
        readme.write_text(broken, "utf-8")
        with pytest.raises(ValueError, match="repair"):
            trainer.create_model_card()
        assert readme.read_text("utf-8") == broken


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    trainer = run(tmp_path)
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    trainer.create_model_card()
    assert not (tmp_path / "model" / "README.md").exists()


def test_base_class_fails_halfway(tmp_path, monkeypatch):
    """The card that is there, and output_dir, survive whatever the base class does."""
    trainer = run(tmp_path)
    before = card(trainer)

    def fail(self, *args, **kwargs):
        Path(self.args.output_dir, "README.md").write_text("half", "utf-8")
        raise OSError("disk full")

    monkeypatch.setattr(Trainer, "create_model_card", fail)
    with pytest.raises(OSError, match="disk full"):
        trainer.create_model_card()
    assert (tmp_path / "model" / "README.md").read_text("utf-8") == before
    assert trainer.args.output_dir == str(tmp_path / "model")


# ---- What was logged ----


def line(step, epoch, ce, kl, alpha=2.0, **more):
    parts = {"loss": ce + alpha / 2 * kl, "ce_loss": ce, "kl_loss": kl, "kl_share": alpha / 2 * kl / ce}
    return {"step": step, "epoch": epoch, **parts, **more}


def test_curves_by_epoch():
    head = describe_head(make_model("single"))
    history = [
        line(10, 0.5, 4.0, 0.4),
        line(40, 1.0, 2.0, 0.8),  # 30 steps: three times the weight
        {"step": 40, "epoch": 1.0, "eval_loss": 1.5, "eval_runtime": 3.0},
        line(60, 1.5, 1.0, 0.5),
    ]
    lines = curves_part(history, head, 2.0)["table"].splitlines()
    assert lines[0] == "| epoch | step | loss | CE | KL | alpha/2 x KL over CE | evaluation loss |"
    assert lines[2] == "| 1 | 40 | 3.2 | 2.5 | 0.7 | 28.0% | 1.5 |"
    assert lines[3] == "| 1.5 | 60 | 1.5 | 1 | 0.5 | 50.0% | – |"
    long = [line(i, i, 1.0, 0.1) for i in range(1, 101)]
    part = curves_part(long, head, 2.0)
    shown = [row.split(" | ")[0] for row in part["table"].splitlines()[2:]]
    assert part["thinned"] and len(shown) == MAX_ROWS and shown[0] == "| 1" and shown[-1] == "| 100"
    assert curves_part([], head, 2.0) is None
    plain = curves_part([line(10, 1.0, 2.0, 0.0)], head, 0.0)["table"]
    assert "KL" not in plain and "| 1 | 10 | 2 |" in plain


def test_the_scores_of_the_weights_as_they_are(tmp_path):
    trainer = run(tmp_path)
    state = trainer.state
    within = [{"step": s, "epoch": s, "eval_accuracy": s / 10, "eval_loss": 1.0} for s in (1, 2, 3)]
    state.log_history = [*within, {"train_runtime": 1.0, "step": 4}]
    assert last_evaluation(trainer.state, trainer.args) == {
        "metrics": {"accuracy": 0.3, "loss": 1.0},
        "step": 3,
        "best": False,
    }
    assert "at step 3 of 4" in card(trainer)
    trainer.args.load_best_model_at_end, state.best_global_step = True, 2
    assert last_evaluation(trainer.state, trainer.args)["metrics"]["accuracy"] == 0.2
    assert "the best checkpoint" in card(trainer)
    # several evaluation sets give several lines; what was measured after training counts most
    state.log_history += [{"step": 4, "eval_a_accuracy": 0.7}, {"step": 4, "eval_b_accuracy": 0.8}]
    assert last_evaluation(trainer.state, trainer.args)["metrics"] == {"a_accuracy": 0.7, "b_accuracy": 0.8}


def test_economies_and_an_inert_term_are_told(tmp_path):
    trainer = run(
        tmp_path, rdrop_shared_layers=1, rdrop_interval=2, rdrop_passes=3, rdrop_alpha=1e-6, label_smoothing_factor=0.2
    )
    text = section(card(trainer), "R-Drop")
    assert "first 1 of 2 layers" in " ".join(text.split()) and "one of every 2 optimizer steps" in text
    assert "mean_j CE_j + 5e-07 * mean_(i<j) sKL(P_i, P_j)" in text and "label smoothing 0.2" in text
    assert "hardly changed the training" in text


# ---- Variants of the objective ----

VARIANTS = {
    "agreement": (
        {"rdrop_agreement": "jensen_shannon + 0.1 * hidden_states"},
        [
            *("(CE_1 + CE_2) / 2 + 1 * A(P_1, P_2)", "A = jensen_shannon + 0.1 * hidden_states", "1/2 KL(P||M)"),
            *("averaged over layers,", "CE and what compares predictions are means", "within each micro-batch"),
        ],
    ),
    "factor": ({"rdrop_agreement": "2 * symmetric_kl"}, ["1 * A(P_1, P_2)", "A = 2 * symmetric_kl"]),
    "schedule": (
        {"rdrop_alpha_schedule": "linear", "rdrop_alpha_warmup": 0.5},
        ["`rdrop_alpha` 2 in the end", "rose to this value linearly over the first 50% of the optimizer steps"],
    ),
    "ramp": (
        {"rdrop_alpha_schedule": "sigmoid", "rdrop_alpha_warmup": 1.0},
        ["rose to this value as exp(-5 (1 - t)^2) for t from 0 to 1 over the whole training", "alpha / 2 * sKL was"],
    ),
    "steps": (
        {"rdrop_alpha_schedule": "linear", "rdrop_alpha_warmup": 3},
        ["linearly over the first 3 steps"],
    ),
    "sources": (
        {"rdrop_layer_drop": 0.1},
        ["each row skipped each hidden layer with probability 0.1", "(CE_1 + CE_2) / 2 + 1 * sKL"],
    ),
    "inserted": (
        {"head": "causal", "rdrop_insert_dropout": 0.2},
        ["dropout of rate 0.2 was put on the outputs of the attention and feed-forward blocks (the saved model has"],
    ),
    "unlabeled": (
        {"rdrop_unlabeled": True},
        ["CE is a mean over the labelled rows", "one over those of all its rows"],
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_are_told(variant, tmp_path):
    args, told = VARIANTS[variant]
    text = card(run(tmp_path, rdrop_alpha=2.0, **args))
    part = " ".join(section(text, "R-Drop").split())
    for words in told:
        assert words in part
    assert ("sKL" in part) == ("A =" not in part)
    assert ("rose to" in part) == ("rdrop_alpha_schedule" in args)
    assert ("Sources of sub-models" in part) == (variant in ("sources", "inserted"))
    assert ("labelled" in part) == (variant == "unlabeled")
    column = "disagreement" if "A =" in part else "KL"
    assert f"| CE | {column} | alpha/2 x {column} over CE |" in text
    opening = text.partition("## ")[0]
    assert ("dropout masks" in opening) == (variant not in ("sources", "inserted"))
    assert "2 passes" in opening


def test_the_default_is_told_without_variants(trained):
    part = section(card(trained), "R-Drop")
    variants = ("A =", "rose to", "Sources", "labelled", "in the end", "logits_for_agreement")
    for words in (*variants, "no gradient"):
        assert words not in part


@pytest.mark.parametrize("head", ["multi", "regression"])
def test_another_agreement_of_other_heads(head, tmp_path):
    text = card(run(tmp_path, head, rdrop_agreement="squared_logits"))
    part = " ".join(section(text, "R-Drop").split())
    if head == "multi":
        assert "(BCE_1 + BCE_2) / 2 + 0.5 * A(P_1, P_2)" in part and "each by itself (Bernoulli)" in part
        assert "the squared difference of the scores before" in part
    else:
        assert "`squared_logits`: the squared difference of the predictions." in part and "probabilit" not in part
        assert "| MSE | disagreement |" in text


def test_the_share_follows_the_schedule(tmp_path):
    """By the alpha of each log line, not by the last one."""
    trainer = run(tmp_path, rdrop_alpha=2.0, rdrop_alpha_schedule="linear", rdrop_alpha_warmup=1.0, logging_steps=4)
    (logged,) = [entry for entry in trainer.state.log_history if "kl_share" in entry]
    assert logged["rdrop_alpha"] < 1.9
    assert f"| {logged['kl_share']:.1%} |" in section(card(trainer), "Training by epoch")


def test_a_function_for_the_agreement_is_told(tmp_path):
    def logits(outputs, inputs):
        return outputs.logits

    trainer = run(tmp_path, trainer_kwargs={"logits_for_agreement": logits}, rdrop_alpha=2.0)
    text = card(trainer)
    part = " ".join(section(text, "R-Drop").split())
    assert "(CE_1 + CE_2) / 2 + 1 * A(P_1, P_2)" in part and "`logits_for_agreement`" in part
    assert "| CE | disagreement |" in text


def test_without_a_processor(tmp_path):
    for head, name in (("image", "image processor"), ("audio", "feature extractor"), ("choice", "tokenizer")):
        trainer = run(tmp_path / head, head, trainer_kwargs={"processing_class": None})
        text = card(trainer)
        assert f"No {name} was saved with the model" in text and "Processor" not in section(text, "How to use it")


def test_dropout_rates():
    model = make_model("single", 0.1)
    model.dropout.p = 0.3
    assert dropout_rates(model) == "0.3 (dropout modules: 1); 0.1 (dropout modules: 7)"
    assert dropout_rates(torch.nn.Linear(2, 2)) == ""


def test_without_matplotlib(tmp_path, monkeypatch, pictures):
    trainer = run(tmp_path)
    assert f"({PLOT})" in card(trainer)
    (tmp_path / "model" / PLOT).unlink()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    text = card(trainer)
    assert PLOT not in text and "| epoch | step |" in text and not (tmp_path / "model" / PLOT).exists()


# ---- Comparison and consistency ----


def test_comparison(trained):
    trainer = trained
    text = section(
        card(trainer, comparison=str(SHORT / "comparison.json"), **DATA), "Comparison with plain fine-tuning"
    )
    assert "not of this model" in text and "`mrpc`" in text
    # the figures of the report beside it
    assert "| rdrop | 3 | 76.63 ± 0.37 | +0.25 [-1.23, +1.72] | 1.81x | 1.53x |" in text
    assert "| baseline | 3 | 76.39 ± 1.11 | – | 1.00x | 1.00x |" in text and "75%" in text
    report = (SHORT / "comparison.md").read_text("utf-8")
    assert "76.63 ± 0.37" in report and "+0.25 [-1.23, +1.72]" in report


def test_which_task_of_a_comparison():
    found = json.loads((SHORT / "comparison.json").read_text("utf-8"))
    assert read_comparison(found, ["rdrop-CoLA"])["task"] == "cola"
    assert read_comparison((found, "sst2"), ["cola"])["task"] == "sst2"
    assert read_comparison({"rows": [row for row in found["rows"] if row["task"] == "mrpc"]})["task"] == "mrpc"
    assert read_comparison(None) is None
    for names in ((), ("qqp",), ("cola", "sst2")):
        with pytest.raises(ValueError, match="sst2, mrpc, cola"):
            read_comparison(found, names)
    with pytest.raises(ValueError, match="no task 'qqp'"):
        read_comparison((found, "qqp"))
    assert read_comparison({"rows": [{**found["rows"][0], "differences": {}}]})["coverage"] == "75"
    of_a_loss = [{**row, "lower_is_better": True} for row in found["rows"] if row["task"] == "mrpc"]
    assert "lower is better | gain over baseline" in read_comparison({"rows": of_a_loss})["table"]


def make_consistency(score=0.75):
    scores = {"loss": Score(0.5, (0.6, 0.8), (0.6, 0.55)), "accuracy": Score(score, (0.5, 0.75), (0.5, 0.75))}
    return Consistency(2, 8, scores, 0.25, 0.125, (0.1, 0.0625))


def test_consistency(tmp_path, trained):
    trainer = trained
    found = make_consistency()
    (tmp_path / "consistency.json").write_text(json.dumps({"validation": found.to_dict()}), "utf-8")
    first = card(trainer, consistency=found)
    for source in (found.to_dict(), {"validation": found.to_dict()}, tmp_path / "consistency.json"):
        assert card(trainer, consistency=source) == first
    text = section(first, "Is dropout off what the ensemble of sub-models would be?")
    assert "| loss | 0.5000 | 0.7000 ± 0.1414 | 0.5500 |" in text
    assert "| 8 | 2 | 0.25 | 0.125 | 0.0625 |" in text and "nats" in text
    several = {"models": {"base": {"validation": found.to_dict()}, "r|d": {"validation": found.to_dict()}}}
    text = section(card(trainer, consistency=several), "Is dropout off what the ensemble of sub-models would be?")
    assert "| base | loss |" in text and r"| r\|d | accuracy |" in text and "not about all" in text
    two = read_consistency({"matched": found.to_dict(), "mismatched": found.to_dict()})
    assert "| mismatched | loss |" in two["scores"] and not two["several_models"]


BROKEN = ("{", "[1]", "{}", '{"rows": []}', '{"rows": [{"task": "a"}]}', '{"a": {"scores": 1}}', '{"a": 1}')


@pytest.mark.parametrize("read", [read_comparison, read_consistency])
@pytest.mark.parametrize("content", [None, 3, *BROKEN])
def test_broken_evidence(read, content, tmp_path):
    source = tmp_path / "evidence.json"
    if isinstance(content, str):
        source.write_text(content, "utf-8")
    with pytest.raises(ValueError, match=r": give |: finish it"):
        read(3 if content == 3 else source)


@pytest.mark.parametrize("argument", ["comparison", "consistency"])
def test_broken_evidence_is_refused_before_anything_is_written(argument, trained, tmp_path):
    before = card(trained)
    with pytest.raises(ValueError, match="cannot be read"):
        trained.create_model_card(**{argument: tmp_path / "none.json"})
    assert (Path(trained.args.output_dir) / "README.md").read_text("utf-8") == before


# ---- Text ----


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/alice/x/model", "model"),
        (r"C:\Users\alice\model", "model"),
        ("~/models/tiny/", "tiny"),
        ("file:///home/alice/data.csv", "data.csv"),
        ("--data_dir=/home/alice/d and ../q/r", "--data_dir=d and r"),
        ("org/name", "org/name"),
        ("WMT14 en/de", "WMT14 en/de"),
        ("https://huggingface.co/org/name", "https://huggingface.co/org/name"),
        ("$DATA/sst2/train.jsonl.gz", "$DATA/sst2/train.jsonl.gz"),
    ],
)
def test_public(text, shown):
    assert public(text) == shown


def test_relative_folders_are_no_hub_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "base").mkdir(parents=True)
    assert not is_hub_id("outputs/base") and public("outputs/base") == "base"
    assert is_hub_id("org/base") and not is_hub_id("") and not is_hub_id(None) and not is_hub_id("a b")


def test_cells():
    assert table(["a"], [[inline("x|y")]]).splitlines()[-1] == r"| x\|y |"
    assert [number(value) for value in (None, 3, 0.123456, 123456.7, math.inf, "a_b")] == [
        *("–", "3", "0.1235", "123457", "inf", "a_b")
    ]
