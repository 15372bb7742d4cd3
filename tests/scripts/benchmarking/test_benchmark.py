"""benchmark.py: its meters on known cases, its arithmetic on made-up samples, its arms, and a whole small run."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical, kl_divergence

import benchmark
from benchmarking.loss import CLOSED_FORM, OFFICIAL, loss_arms, loss_differences, official_kl
from benchmarking.loss import FUSED as FUSED_LOSS
from benchmarking.measure import Arm, elementwise_seconds, measure, peak_bytes
from benchmarking.plots import plot
from benchmarking.precision import CLASSES, DTYPES, LOW, OURS, TARGETS, precision_errors
from benchmarking.report import markdown, memory_ratio, tables, time_ratio
from benchmarking.steps import (
    DOUBLED,
    FUSED,
    HEADS,
    PLAIN,
    RDROP,
    TRUNK_3_4,
    TWO_FORWARDS,
    Sizes,
    make_batch,
    step_arms,
    step_settings,
    trunk_layers,
)

CPU = torch.device("cpu")
MB = 1_000_000
SMALL = Sizes(layers=4, width=16, batch=2, length=6, vocab=50)


# ---- Meters ----


def test_peak_memory_of_known_cases():
    assert peak_bytes(lambda: torch.empty(10 * MB), CPU) == 40 * MB
    kept = []
    assert peak_bytes(lambda: kept.append(torch.empty(MB)), CPU) == 4 * MB

    def one_after_the_other():
        for _ in range(3):
            torch.empty(5 * MB)

    def at_once():
        first, second = torch.empty(5 * MB), torch.empty(2 * MB)
        del first
        return second, torch.empty(MB)

    assert peak_bytes(one_after_the_other, CPU) == 20 * MB
    assert peak_bytes(at_once, CPU) == 28 * MB  # 20 + 8; afterwards 8 + 4


def test_peak_memory_leaves_out_what_was_there_and_counts_backward():
    x = torch.ones(MB, requires_grad=True)
    assert peak_bytes(lambda: x.detach().add_(1), CPU) < 100  # in place

    def step():
        (x.exp().exp()).backward(torch.ones(()).expand(MB))
        x.grad = None

    # Both exponentials are kept for their gradients, then two gradients at a time.
    assert 16 * MB <= peak_bytes(step, CPU) <= 20 * MB


def test_arms_take_turns_and_times_are_per_step(monkeypatch):
    ran = []
    monkeypatch.setattr("benchmarking.measure.SAMPLE_SECONDS", 0)
    arms = [Arm(name, lambda name=name: ran.append(name), steps) for name, steps in (("a", 1), ("b", 2), ("c", 4))]
    clock = iter(range(1000))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))  # every call takes 1 s
    told = []
    results = measure(arms, 4, CPU, told.append)
    assert ran[:6] == ["a", "a", "b", "b", "c", "c"]  # warm-up and memory
    assert ran[6:] == ["a", "b", "c", "a", "c", "b", "c", "a", "b", "c", "b", "a"]
    assert told == ["a", "b", "c", *ran[6:]]
    assert [results[name]["seconds"] for name in "abc"] == [[1.0] * 4, [0.5] * 4, [0.25] * 4]


def test_short_calls_are_repeated_within_a_sample():
    ran = []
    result = measure([Arm("short", lambda: ran.append(1))], 1, CPU)["short"]
    assert result["calls"] == 1000 and len(ran) == 1002 and result["seconds"][0] < 1e-3


def test_time_outside_the_matrix_products():
    x = torch.ones(600, 600)
    products = elementwise_seconds(lambda: torch.mm(x, x), CPU)
    both = elementwise_seconds(lambda: [torch.mm(x, x), *(x.exp() for _ in range(30))], CPU)
    assert products < 0.5 * both


# ---- Arms ----


def test_official_formula_is_the_mean_symmetric_divergence():
    torch.manual_seed(0)
    first, second = torch.randn(2, 5, 7, dtype=torch.float64)
    p, q = Categorical(logits=first), Categorical(logits=second)
    each = (kl_divergence(p, q) + kl_divergence(q, p)) / 2
    ignored = torch.tensor([False, True, False, False, True])
    torch.testing.assert_close(official_kl(first, second), each.mean())
    torch.testing.assert_close(official_kl(first, second, ignored), each[~ignored].mean())


@pytest.mark.parametrize("vocab", [2, 300])
def test_arms_of_the_loss_stage_agree_with_an_independent_loss(vocab):
    arms = loss_arms(9, vocab, 8, 3.0, CPU, torch.float32, seed=1)
    assert [arm.name for arm in arms] == [OFFICIAL, CLOSED_FORM, FUSED_LOSS]
    generator = torch.Generator().manual_seed(1)
    first = torch.randn(9, 8, generator=generator)
    second = first + 0.1 * torch.randn(9, 8, generator=generator)
    weight = torch.randn(vocab, 8, generator=generator) * 8**-0.5
    labels = torch.randint(vocab, (9,), generator=generator)
    p, q = (Categorical(logits=F.linear(h, weight).double()) for h in (first, second))
    ce = -(p.log_prob(labels) + q.log_prob(labels)).mean() / 2
    kl = (kl_divergence(p, q) + kl_divergence(q, p)).mean() / 2
    for arm in arms:
        assert arm.run()[0].item() == pytest.approx((ce + 1.5 * kl).item(), rel=1e-5)
    assert max(loss_differences(arms).values()) < 1e-5
    other = loss_arms(9, vocab, 8, 4.0, CPU, torch.float32, seed=1)
    assert loss_differences([arms[0], other[1]])["loss"] > 1e-4  # another alpha is seen


def test_trunks_of_twelve_layers_and_of_few():
    twelve = {"trunk L/2": 6, TRUNK_3_4: 9, "trunk L-1": 11}
    assert trunk_layers("causal-lm", 12) == twelve and trunk_layers("masked-lm", 12) == twelve
    assert trunk_layers("sequence-classification", 12) == {**twelve, "trunk L": 12}
    encoder = {"trunk L/2": 3, TRUNK_3_4: 4, "trunk L-1": 5, "trunk L": 6}
    assert trunk_layers("translation", 12) == encoder
    assert trunk_layers("translation", 4) == {"trunk L/2": 1, "trunk L": 2}


def test_batches_have_the_labels_of_their_head():
    sizes = Sizes(layers=4, width=16, batch=3, length=20, vocab=50)
    shapes = {head: tuple(make_batch(head, sizes, 0)["labels"].shape) for head in HEADS}
    assert shapes == {**dict.fromkeys(HEADS, (3, 20)), "sequence-classification": (3,)}
    assert ((make_batch("masked-lm", sizes, 0)["labels"] != -100).sum(1) == 3).all()  # 15 %
    assert (make_batch("causal-lm", sizes, 0)["labels"] >= 0).all()


@pytest.fixture(scope="module")
def translation_arms(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("trainers"))
    common = {"alpha": 1.0, "device": CPU, "dtype": torch.float32, "seed": 0, "folder": folder}
    return {arm.name: arm for arm in step_arms("translation", SMALL, None, **common)}


def test_steps_train_and_a_cycle_of_the_interval_is_one_run(translation_arms):
    assert list(translation_arms) == list(step_settings("translation", 4))
    for name, arm in translation_arms.items():
        trainer = arm.run.trainer
        step, before = trainer.state.global_step, [p.detach().clone() for p in trainer.model.parameters()]
        rows = []
        hook = trainer.model.get_encoder().register_forward_pre_hook(
            lambda module, args, kwargs, rows=rows: rows.append(len(kwargs["input_ids"])), with_kwargs=True
        )
        arm.run()
        hook.remove()
        assert trainer.state.global_step == step + arm.steps
        assert any((p != q).any() for p, q in zip(trainer.model.parameters(), before, strict=True)), name
        assert all(p.grad is None for p in trainer.model.parameters())
        expected = {PLAIN: [2], TWO_FORWARDS: [2, 2], "interval 2": [2, 4], "interval 4": [2, 2, 2, 4]}
        assert rows == expected.get(name, [4]), name


def test_without_dropout_every_step_has_the_plain_loss(translation_arms):
    """No disagreement is left then, so two passes have the loss of one: the arms differ in nothing else."""
    losses = {}
    for name in (PLAIN, TWO_FORWARDS, RDROP, FUSED, "trunk L/2"):
        trainer = translation_arms[name].run.trainer
        state = translation_arms[PLAIN].run.trainer.model.state_dict()
        trainer.model.load_state_dict({key: value.clone() for key, value in state.items()})
        for module in trainer.model.modules():
            if hasattr(module, "dropout") and isinstance(module.dropout, float):
                module.dropout = 0.0
        batch = make_batch("translation", SMALL, 7)
        count = trainer.get_batch_samples(iter([batch]), 1, CPU)[1]
        losses[name] = float(trainer.training_step(trainer.model, batch, count))
        trainer.model.zero_grad()
    assert losses == pytest.approx(dict.fromkeys(losses, losses[PLAIN]), rel=1e-5)


# ---- Arithmetic and report ----


def samples(seconds, peak, **more):
    return {"seconds": seconds, "peak_bytes": peak, "settings": {}, "steps": 1, "calls": 1, **more}


def test_ratios_are_paired_by_repeat():
    # The machine was ten times slower in the second repeat: the ratio of each repeat does not see it.
    arms = {PLAIN: samples([1.0, 10.0, 1.2], 100), RDROP: samples([2.0, 21.0, 2.16], 250)}
    assert time_ratio({"arms": arms}, RDROP, PLAIN) == pytest.approx(2.0)
    assert memory_ratio({"arms": arms}, RDROP, PLAIN) == 2.5


def make_results(groups, **more):
    return {
        "command": "python scripts/benchmark.py",
        "versions": {"torch": "2"},
        "device": "a processor",
        "device_type": "cpu",
        "cpu_threads": 2,
        "started": "now",
        "arguments": {"dtype": "float32", "repeats": 1},
        "groups": groups,
        **more,
    }


def loss_group(vocab, official, closed, fused):
    times, peaks = zip(official, closed, fused, strict=True)
    arms = zip((OFFICIAL, CLOSED_FORM, FUSED_LOSS), times, peaks, strict=True)
    made = {name: samples([seconds], peak) for name, seconds, peak in arms}
    differences = {"loss": 1e-7}
    return {"section": "loss", "rows": 8, "vocab": vocab, "width": 4, "arms": made, "differences": differences}


def find(made, title):
    return next(table for table in made if table.title.startswith(title))


def test_tables_say_what_was_measured():
    groups = [loss_group(100, (1.0, 60), (0.5, 70), (0.8, 30)), loss_group(32000, (6.0, 90), (3.0, 60), (2.0, 15))]
    groups.append({"section": "loss", "rows": 9, "vocab": 10**9, "width": 4, "arms": {}, "left_out": "too large"})
    made = tables(make_results(groups))
    rows = find(made, "Loss stage").rows
    assert rows[1][4:9] == ["2.00x", "1.50x", "3.00x", "6.00x", "0.67"]
    assert rows[2][2] == "left out: too large"
    assert find(made, "Limits").rows == [
        ["loss stage, V >= 32k: official time / fused", ">= 2.5", "3.00", "yes"],
        ["loss stage, V >= 32k: official memory / fused", ">= 4", "6.00", "yes"],
        ["loss stage, every V: time of auto's choice / closed form", "<= 1", "1.00", "yes"],
        ["loss stage, V <= 1000: time of auto's choice / official", "<= 1", "0.50", "yes"],
    ]


def step_group(head, times, peaks, **more):
    arms = {name: samples([seconds], peaks[name]) for name, seconds in times.items()}
    sizes = {"layers": 12, "width": 4, "batch": 2, "length": 3, "vocab": 32000}
    return {"section": "steps", "head": head, "sizes": sizes, "arms": arms, **more}


def test_limits_take_the_worst_case():
    times = {PLAIN: 1.0, DOUBLED: 2.0, RDROP: 2.02}
    trunks = {TRUNK_3_4: 1.31, "trunk L-1": 1.15}
    first = step_group("sequence-classification", times | trunks, dict.fromkeys([*times, *trunks], 10))
    logits = 2 * 2 * 3 * 32000 * 4
    peaks = {PLAIN: logits, DOUBLED: 2 * logits, RDROP: 3 * logits, FUSED: logits}
    second = step_group("translation", {**times, RDROP: 2.08, FUSED: 1.9}, peaks)
    made = {row[0]: row[1:] for row in find(tables(make_results([first, second])), "Limits").rows}
    assert made["sequence-classification: r-drop time / plain 2B"] == ["<= 1.03", "1.01", "yes"]
    assert made["translation: r-drop time / plain 2B"] == ["<= 1.03", "1.04", "no"]
    assert made["translation: r-drop + fused time / plain 2B"] == ["<= 1.03", "0.95", "yes"]
    assert made["trunk 3L/4 time / plain B, 12 layers"] == ["<= 1.3", "1.31", "no"]
    assert made["trunk L-1 time / plain B, 12 layers"] == ["<= 1.15", "1.15", "yes"]
    assert made["translation: fused time / r-drop"] == ["<= 1", "0.91", "yes"]
    assert made["translation: memory saved by fused / full logits in fp32"] == [">= 1", "2.00", "yes"]


def test_prediction_stands_beside_the_measurement(tmp_path):
    group = step_group("causal-lm", {PLAIN: 1.0, DOUBLED: 2.0, RDROP: 2.0}, {PLAIN: 10, DOUBLED: 20, RDROP: 25})
    group["arms"][RDROP]["prediction"] = {"time": 2.1, "memory": 2.0}
    made = tables(make_results([group]))
    errors = [row[1:] for row in find(made, "Limits").rows if row[0].startswith("cost model")]
    assert errors == [["<= 0.1", "0.05", "yes"], ["<= 0.1", "0.20", "no"]]
    row = find(made, "Training step").rows[2]
    assert row[:5] == ["r-drop", "2000", "2.00", "2.10 (+5%)", "1.00"] and row[6:] == ["2.50", "2.00 (-20%)"]
    assert "| 2.10 (+5%) |" in markdown(make_results([group]), plot([group], tmp_path))
    assert (tmp_path / "steps.png").stat().st_size > 0


# ---- Precision ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", CLASSES)
def test_value_and_gradient_stay_exact_as_the_passes_come_to_agree(dtype, classes, monkeypatch):
    monkeypatch.setattr("benchmarking.precision.ROWS", 128)  # a processor without these types takes its time
    found = [precision_errors(dtype, classes, target) for target in TARGETS]
    assert [errors["kl"]["exact"] for errors in found] == pytest.approx(TARGETS, rel=3)  # bfloat16 moves the smallest
    assert max(errors[OURS]["gradient"] for errors in found) < 2e-3
    assert max(errors[OURS]["value"] for errors in found) < 1e-5
    assert found[-1][LOW]["gradient"] > 0.1  # what this guards against


# ---- The whole command ----

TINY = [
    *("--device", "cpu", "--repeats", "1", "--num_layers", "4", "--hidden_size", "16", "--batch_size", "2"),
    *("--sequence_length", "4", "--vocab_size", "40", "--loss_rows", "4", "--loss_vocab", "2", "50"),
    *("--loss_width", "8", "--growth_vocab", "30", "40", "--growth_length", "4", "--growth_batch", "1"),
    *("--growth_layers", "4", "6"),
]


def test_a_whole_run_writes_samples_tables_and_plots(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "out"
    for name, only in (("DTYPES", "float16"), ("CLASSES", 3), ("TARGETS", 1e-3)):
        monkeypatch.setattr(benchmark, name, (only,))
    benchmark.main([*TINY, "--output_dir", str(folder)])
    assert sorted(path.name for path in folder.iterdir()) == [
        *("benchmark.json", "benchmark.md", "growth.png", "loss.png", "steps.png")
    ]
    results = json.loads((folder / "benchmark.json").read_text())
    groups = results["groups"]
    sections = ["loss"] * 2 + ["steps"] * len(HEADS) + ["growth"] * 6 + ["precision"]
    assert [group["section"] for group in groups] == sections
    for group in groups:
        assert all(len(arm["seconds"]) == 1 and arm["peak_bytes"] > 0 for arm in group["arms"].values())
    assert [group["head"] for group in groups[2:7]] == list(HEADS)
    assert set(groups[5]["arms"]) == set(step_settings("causal-lm", 4))
    assert set(groups[-2]["arms"]) == {PLAIN, RDROP, TRUNK_3_4} and groups[-2]["sizes"]["layers"] == 6
    assert groups[-1]["errors"]["kl"]["exact"] == pytest.approx(1e-3, rel=0.01)
    assert results["command"].startswith("python scripts/benchmark.py --device cpu --repeats 1")
    assert set(results["versions"]) == {"python", "torch", "transformers", "accelerate", "hf_rdrop"}
    text = (folder / "benchmark.md").read_text()
    assert "## Training step: masked-lm" in text and "![loss](loss.png)" in text and "## Limits" in text
    assert "Limits" in capsys.readouterr().out
    for path in folder.glob("*.png"):
        assert path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size < 150_000

    with pytest.raises(ValueError, match="holds a benchmark"):
        benchmark.main([*TINY, "--output_dir", str(folder)])


def test_what_was_measured_survives_an_interruption(tmp_path, monkeypatch):
    measured = []

    def interrupted(arms, *rest):
        if measured:
            raise KeyboardInterrupt
        measured.append(1)
        return measure(arms, *rest)

    monkeypatch.setattr(benchmark, "measure", interrupted)
    with pytest.raises(SystemExit) as stopped:
        benchmark.main([*TINY, "--sections", "loss", "--output_dir", str(tmp_path / "out")])
    assert stopped.value.code == 130
    assert len(json.loads((tmp_path / "out" / "benchmark.json").read_text())["groups"]) == 1
    assert "Loss stage" in (tmp_path / "out" / "benchmark.md").read_text()


def test_a_size_that_does_not_fit_is_left_out_and_said(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "free_bytes", lambda device: 1000)
    results = benchmark.main([*TINY, "--sections", "loss", "--output_dir", str(tmp_path / "out")])
    assert [bool(group["arms"]) for group in results["groups"]] == [True, False]  # 7 * 2 * 4 * 50 * 4 bytes
    assert "left out: the official formula needs" in (tmp_path / "out" / "benchmark.md").read_text()


def test_a_gpu_without_enough_memory_does_not_end_the_run(tmp_path, monkeypatch):
    def full(arms, *rest):
        if len(arms) > 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")
        return measure(arms, *rest)

    monkeypatch.setattr(benchmark, "measure", full)
    flags = [
        "--sections",
        "loss",
        "steps",
        "--heads",
        "sequence-classification",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    results = benchmark.main([*TINY, *flags])
    assert [bool(group["arms"]) for group in results["groups"]] == [True, True, False]
    assert "| left out: CUDA out of memory |" in (tmp_path / "out" / "benchmark.md").read_text()


def test_arms_that_compute_different_things_are_not_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "loss_differences", lambda arms: {"loss": float("nan")})
    with pytest.raises(ValueError, match=r"differ by more than 0\.0001 at 4 x 2"):
        benchmark.main([*TINY, "--sections", "loss", "--output_dir", str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sections", "loss", "speed"], "--sections takes one or more of loss, steps, growth"),
        (["--heads", "vision"], "--heads takes one or more of sequence-classification"),
        (["--heads", "translation", "translation"], "each once"),
        (["--repeats", "0"], "--repeats at least 1"),
        (["--rdrop_alpha", "0"], "--rdrop_alpha must be above 0"),
        (["--rdrop_alpha", "-1"], "rdrop_alpha must be a finite number >= 0"),
        (["--num_layers", "5"], "--num_layers must be even"),
        (["--num_layers", "2"], "--num_layers must be at least 4"),
        (["--growth_layers", "2", "8"], "--growth_layers must be at least 4"),
        (["--hidden_size", "100"], "multiple of 64"),
        (["--hidden_size", "15"], "must be even"),
        (["--batch_size", "0"], "--batch_size must be at least 1"),
        (["--loss_vocab", "1"], "--loss_vocab must be at least 2"),
        (["--loss_rows", "4", "4"], "--loss_rows takes one or more different numbers"),
        (["--dtype", "float64"], "dtype"),
        (["--loss_vocabs", "4"], "unknown argument --loss_vocabs"),
    ],
)
def test_impossible_flags_are_refused_before_anything_is_written(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        benchmark.main([*TINY, *flags, "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="finds no GPU"):
        benchmark.main([*TINY, "--device", "cuda", "--output_dir", str(tmp_path / "out")])
