"""Shared trunk, fused head and interval through the Trainer: each cheaper, none changing what it should not."""

import logging

import pytest
import torch
from transformers import TrainerCallback

from hf_rdrop import RDropSeq2SeqTrainer, RDropTrainer
from support.training import InOrder, make_model, make_rows, step_logs, train

TINY = 1e-9  # a dropout rate that makes a model stochastic on paper and never drops anything


class RowCounter(RDropTrainer):
    """Records how many rows each forward of the model got, and of each of its layers."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.rows, self.layer_rows = [], []
        self.model.register_forward_pre_hook(
            lambda module, args, kwargs: self.rows.append(len(kwargs["input_ids"])) if module.training else None,
            with_kwargs=True,
        )
        # Within a layer one sees what the trunk has made of its input.
        for layer in self.model.bert.encoder.layer:
            layer.attention.register_forward_pre_hook(
                lambda module, args: self.layer_rows.append(len(args[0])) if module.training else None
            )


@pytest.mark.parametrize("interval", [1, 2, 3])
def test_interval_doubles_every_nth_step_and_all_its_micro_batches(interval):
    trainer = train(
        make_model("single", 0.2),
        trainer_class=RowCounter,
        max_steps=6,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        rdrop_interval=interval,
    )
    expected = [8 if step % interval == 0 else 4 for step in range(6) for _ in range(2)]
    assert trainer.rows == expected
    for step, entry in enumerate(step_logs(trainer)):
        assert (entry["kl_loss"] > 0) is (step % interval == 0)
        assert entry["loss"] == pytest.approx(entry["ce_loss"] + 0.5 * entry["kl_loss"], rel=1e-5)


def test_interval_goes_on_where_training_was_interrupted(tmp_path):
    args = {"rdrop_interval": 3, "trainer_class": RowCounter, "rows": InOrder(make_rows("single", 64))}
    args |= {"per_device_train_batch_size": 4, "output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 2}
    whole = train(make_model("single", 0.2), max_steps=8, **args)
    resumed = RowCounter(
        model=make_model("single", 0.2),
        args=whole.args,
        train_dataset=whole.train_dataset,
        data_collator=whole.data_collator,
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert whole.rows == [8, 4, 4, 8, 4, 4, 8, 4] and resumed.rows == whole.rows[4:]


@pytest.mark.parametrize("head", ["single", "multi", "regression", "token"])
def test_a_shared_trunk_changes_nothing_without_dropout(head):
    runs = [
        train(make_model(head, TINY), head, rdrop_alpha=2.0, rdrop_shared_layers=shared, learning_rate=1e-3)
        for shared in (0, 1, 0.5, 2)
    ]
    for run in runs[1:]:
        for ours, plain in zip(step_logs(run), step_logs(runs[0]), strict=True):
            assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-5)
            assert ours["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_shared_layers_see_each_row_once(accumulation, checkpointing):
    """Also when gradient checkpointing runs them again in the backward pass."""
    trainer = train(
        make_model("single", 0.2),
        trainer_class=RowCounter,
        max_steps=2,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=accumulation,
        rdrop_shared_layers=1,
        gradient_checkpointing=checkpointing,
    )
    assert trainer.rows == [16] * 2 * accumulation
    # The first layer gets 8 rows and the second 16; the backward pass begins with the second.
    assert trainer.layer_rows == ([8, 16, 16, 8] if checkpointing else [8, 16]) * 2 * accumulation
    assert all(entry["kl_loss"] > 0 for entry in step_logs(trainer))


def test_evaluation_and_prediction_share_nothing():
    trainer = train(make_model("single", 0.2), rdrop_shared_layers=1, eval_strategy="steps", eval_steps=1, max_steps=2)
    alone = trainer.predict(trainer.eval_dataset)
    trainer.rdrop_run.remove()
    assert (alone.predictions == trainer.predict(trainer.eval_dataset).predictions).all()
    assert alone.predictions.shape == (11, 3)


def test_training_mode_forwards_of_others_share_nothing():
    """A callback may run the model in training mode between the steps, as Monte Carlo dropout does."""
    seen = []

    class MonteCarlo(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            ids = torch.randint(3, 40, (8, 6))
            hidden = model.bert(torch.cat((ids, ids)), output_hidden_states=True).hidden_states[1]
            seen.append((hidden[:8] - hidden[8:]).abs().max().item())

    train(make_model("single", 0.3), rdrop_shared_layers=2, trainer_kwargs={"callbacks": [MonteCarlo()]})
    assert len(seen) == 2 and min(seen) > 0


def test_everything_together_in_translation():
    """Whole encoder shared, fused head, every second step, label smoothing, accumulation, bfloat16: the loss falls."""
    trainer = train(
        make_model("seq2seq", 0.1),
        "seq2seq",
        RDropSeq2SeqTrainer,
        rows=make_rows("seq2seq", 16),
        max_steps=40,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        label_smoothing_factor=0.1,
        bf16=True,
        rdrop_alpha=5.0,
        rdrop_shared_layers=1,
        rdrop_fused_head="on",
        rdrop_interval=2,
    )
    losses = [entry["ce_loss"] for entry in step_logs(trainer)]
    assert trainer.rdrop_run.fused_head is not None and trainer.rdrop_run.trunk is not None
    assert losses[-1] < 0.8 * losses[0]
    assert [entry["kl_loss"] > 0 for entry in step_logs(trainer)] == [True, False] * 20


@pytest.mark.parametrize(
    ("args", "dropout", "message"),
    [
        ({"rdrop_shared_layers": 3}, 0.1, "rdrop_shared_layers=3"),
        ({"rdrop_shared_layers": 2}, {"classifier_dropout": 0.0}, "nothing that"),
        ({"rdrop_fused_head": "on"}, 0.1, "no language-model head"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(args, dropout, message):
    model = make_model("single", **(dropout if isinstance(dropout, dict) else {"dropout": dropout}))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        train(model, **args)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_no_economy_with_alpha_zero():
    trainer = train(make_model("single"), rdrop_alpha=0.0, rdrop_shared_layers=1, rdrop_interval=2)
    assert trainer.rdrop_run.trunk is None


def test_restarting_leaves_no_hook_behind():
    trainer = train(make_model("single"), rdrop_shared_layers=1)
    layer = trainer.model.bert.encoder.layer[0]
    hooks = len(layer._forward_pre_hooks), len(layer._forward_hooks)
    trainer.train()
    assert (len(layer._forward_pre_hooks), len(layer._forward_hooks)) == hooks


def test_the_inert_warning_counts_only_the_steps_with_agreement(caplog):
    """With an interval of 4 the mean KL of all steps is a quarter; the warning is about the steps that have one."""
    with caplog.at_level(logging.WARNING, "hf_rdrop"):
        trainer = train(
            make_model("single", 0.3), max_steps=101, per_device_train_batch_size=4, rdrop_interval=4, learning_rate=0
        )
    shares = [entry["kl_loss"] / 2 / entry["ce_loss"] for entry in step_logs(trainer) if entry["kl_loss"]]
    assert len(shares) == 26 and sum(shares) / 26 > 0.01
    assert "hardly changes" not in caplog.text


def test_the_inert_warning_gives_the_share_of_the_steps_with_agreement(caplog):
    args = {"per_device_train_batch_size": 2, "learning_rate": 0, "rdrop_interval": 4, "rdrop_alpha": 1e-4}
    with caplog.at_level(logging.WARNING, "hf_rdrop"):
        trainer = train(make_model("single", 0.3), max_steps=100, **args)
    (line,) = [record.getMessage() for record in caplog.records if "hardly changes" in record.getMessage()]
    watched = [entry for entry in step_logs(trainer) if entry["kl_loss"]]
    kl, ce = (sum(entry[name] for entry in watched) for name in ("kl_loss", "ce_loss"))
    assert len(watched) == 25 and f"alpha/2 * KL was {1e-4 / 2 * kl / ce:.2%} of the cross-entropy" in line


def test_the_cost_is_predicted_once_when_training_starts(caplog):
    with caplog.at_level(logging.INFO, "hf_rdrop"):
        train(make_model("single"), max_steps=3, rdrop_shared_layers=1)
    (line,) = [record.getMessage() for record in caplog.records if "x the time" in record.getMessage()]
    ratio = float(line.split("about ")[1].split("x")[0])
    assert 1 < ratio < 2
    caplog.clear()
    with caplog.at_level(logging.INFO, "hf_rdrop"):
        train(make_model("single"), rdrop_alpha=0.0)
    assert "x the time" not in caplog.text
