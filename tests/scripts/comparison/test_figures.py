"""The figures of a comparison: what is paired with what, what is averaged, what an arm costs."""

import math

import pytest

from comparison.cost import MIN_EXTRA_COST, Cost, gain_per_cost
from comparison.figures import AVERAGE, make_report, points, trial_scores
from comparison.tables import summary, task_table
from support.comparison_data import ARMS, METRICS, make_run, make_runs


def test_scores_are_points_and_differences_paired():
    report = make_report(make_runs(), METRICS, ARMS)
    assert [(row.task, row.arm) for row in report.rows] == [(task, arm) for task in METRICS for arm in ARMS]
    rdrop = report.of_task("ner")["rdrop"]
    assert rdrop.scores == pytest.approx({0: 55, 1: 64, 2: 57}) and rdrop.mean == pytest.approx(176 / 3)
    assert (rdrop.best, rdrop.worst) == pytest.approx((64, 55))
    assert rdrop.gain.values == pytest.approx([5, 4, 2]) and rdrop.gain.mean == pytest.approx(11 / 3)
    assert rdrop.std == pytest.approx(math.sqrt(((55 - 176 / 3) ** 2 + (64 - 176 / 3) ** 2 + (57 - 176 / 3) ** 2) / 2))
    assert rdrop.differences["baseline-2x"].values == pytest.approx([3, 3, 3])
    assert report.of_task("mt")["rdrop"].gain.values == pytest.approx([-1, -0.5, -1])  # BLEU is in points already
    assert report.of_task("ner")["baseline"].gain is None


def test_best_control_is_that_with_the_highest_mean():
    report = make_report(make_runs(), METRICS, ARMS)
    assert report.of_task("ner")["rdrop"].best_control == "baseline-2x"  # 55.67 beside the baseline's 55
    worse = [run for run in make_runs() if run["arm"] != "baseline-2x"]
    assert make_report(worse, METRICS, ARMS).of_task("ner")["rdrop"].best_control == "baseline"


def test_each_control_has_a_correction_of_its_own():
    rows = make_report(make_runs(), METRICS, ARMS).of_task("ner")
    for against in ("baseline", "baseline-2x"):
        found = [row.differences[against] for row in rows.values() if against in row.differences]
        p_values = sorted(one.p_value for one in found if one.p_value is not None)
        smallest = min((one for one in found if one.p_value is not None), key=lambda one: one.p_value)
        assert smallest.holm == pytest.approx(min(1, len(p_values) * p_values[0]))


def as_loss(runs):
    """Task mt with a perplexity in place of BLEU that is as good: 100 minus BLEU."""
    of_mt = [run for run in runs if run["task"] == "mt"]
    return [
        dict(run, metrics={**run["metrics"], "eval_perplexity": 100 - run["metrics"]["eval_bleu"]}) for run in of_mt
    ]


def test_a_loss_is_judged_as_the_score_that_is_as_good():
    scores = make_report(make_runs(), METRICS, ARMS).of_task("mt")
    losses = make_report(as_loss(make_runs()), {"mt": "eval_perplexity"}, ARMS).of_task("mt")
    assert losses["rdrop"].gain.mean < 0 < losses["baseline-2x"].gain.mean and losses["rdrop"].lower_is_better
    for arm, score in scores.items():
        loss = losses[arm]
        assert loss.scores == pytest.approx({seed: 100 - value for seed, value in score.scores.items()})
        assert (loss.best, loss.worst) == pytest.approx((100 - score.best, 100 - score.worst))
        assert (loss.best_control, loss.share_kept) == (score.best_control, score.share_kept)
        assert (loss.spread_ratio, loss.spread_p) == pytest.approx((score.spread_ratio, score.spread_p))
        assert loss.differences.keys() == score.differences.keys() and not score.lower_is_better
        for other, expected in score.differences.items():
            found = loss.differences[other]
            assert found.values == pytest.approx(expected.values) and found.probability == expected.probability
            assert (found.p_value, found.holm) == pytest.approx((expected.p_value, expected.holm))
            assert (found.interval is None) == (expected.interval is None)
            assert found.interval is None or found.interval == pytest.approx(expected.interval)


def test_losses_are_in_no_average():
    runs = [dict(run, task=task) for task in ("a", "b", "c") for run in as_loss(make_runs())]
    report = make_report(runs, {"a": "eval_bleu", "b": "eval_bleu", "c": "eval_perplexity"}, ARMS)
    assert report.averaged == ["a", "b"] and report.not_averaged == ["c"]


@pytest.mark.parametrize(
    ("metric", "scale"),
    [("eval_accuracy", 100), ("eval_bleu", 1), ("eval_rouge2", 1), ("eval_rougeLsum", 1), ("eval_perplexity", 1),
     ("eval_nll", 1), ("eval_ece", 100)],
)  # fmt: skip
def test_only_shares_become_per_cent(metric, scale):
    assert points(metric) == scale


def test_a_missing_seed_is_left_out_of_pairs_only():
    runs = [run for run in make_runs() if (run["task"], run["arm"], run["seed"]) != ("ner", "rdrop", 1)]
    row = make_report(runs, METRICS, ARMS).of_task("ner")["rdrop"]
    assert row.gain.seeds == [0, 2] and row.gain.interval is None and row.gain.p_value is not None
    base = make_report(runs, METRICS, ARMS).of_task("ner")["baseline"]
    assert sorted(base.scores) == [0, 1, 2]


def test_failed_arms_and_a_failed_baseline():
    runs = [run for run in make_runs() if run["arm"] != "rdrop"]
    report = make_report(runs, METRICS, ARMS)
    assert "rdrop" not in report.of_task("ner") and report.of_task("ner")["rdrop-shared"].share_kept is None
    runs = [run for run in make_runs() if run["arm"] != "baseline"]
    row = make_report(runs, METRICS, ARMS).of_task("ner")["rdrop"]
    assert row.gain is None and row.cost.time is None and row.gain_per_cost is None and row.spread_ratio is None
    assert row.differences["baseline-2x"].mean == pytest.approx(3)
    empty = make_report([], METRICS, ARMS)
    assert empty.rows == [] and empty.average == [] and empty.tables == []


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_is_named_and_not_counted(score):
    runs = make_runs()
    runs[0]["metrics"]["eval_f1"] = score
    report = make_report(runs, METRICS, ARMS)
    assert list(report.without_score) == ["ner / baseline / seed 0"]
    assert report.of_task("ner")["rdrop"].gain.seeds == [1, 2] and report.averaged == []


def test_bad_runs_are_refused():
    runs = make_runs()
    with pytest.raises(ValueError, match="ner / baseline / seed 0 is there twice"):
        make_report([*runs, runs[0]], METRICS, ARMS)
    with pytest.raises(ValueError, match=r"eval_rouge is not among the results of ner / baseline / seed 0.*eval_f1"):
        make_report(runs, {"ner": "eval_rouge"}, ARMS)
    with pytest.raises(ValueError, match="another name"):
        make_report(runs, {"average": "eval_f1"}, ARMS)


def test_average_is_by_seed_over_complete_tasks():
    runs = make_runs()
    for run in runs:
        if (run["task"], run["arm"]) == ("mt", "rdrop"):
            run["metrics"]["train_runtime"] = 40.0  # 4 times the baseline's; 1.9 times on the other task
    report = make_report(runs, METRICS, ARMS)
    assert report.averaged == ["ner", "mt"] and report.not_averaged == []
    row = report.of_task(AVERAGE)["rdrop"]
    assert row.scores == pytest.approx({0: (55 + 19) / 2, 1: (64 + 20.5) / 2, 2: (57 + 21) / 2})
    assert row.gain.values == pytest.approx([(5 - 1) / 2, (4 - 0.5) / 2, (2 - 1) / 2])
    assert row.cost.time == pytest.approx(math.sqrt(4 * 1.9)) and report.tables == ["ner", "mt", AVERAGE]
    one_seed_less = [run for run in make_runs() if (run["task"], run["arm"], run["seed"]) != ("mt", "rdrop", 2)]
    report = make_report(one_seed_less, METRICS, ARMS)
    assert report.average == [] and report.averaged == [] and report.not_averaged == ["ner", "mt"]
    three = [*make_runs(), *(dict(run, task="more") for run in make_runs()[:3])]
    report = make_report(three, {**METRICS, "more": "eval_f1"}, ARMS)
    assert report.averaged == ["ner", "mt"] and report.not_averaged == ["more"]


def test_an_arm_of_some_tasks_only_is_left_out_of_the_average():
    others = [dict(run, arm="own") for run in make_runs() if (run["task"], run["arm"]) == ("ner", "rdrop-shared")]
    report = make_report([*make_runs(), *others], METRICS, [*ARMS, "own"])
    assert report.averaged == ["ner", "mt"] and "own" in report.of_task("ner")
    assert list(report.of_task(AVERAGE)) == list(make_report(make_runs(), METRICS, ARMS).of_task(AVERAGE))
    assert "Not here, because they lack a seed of one of these: own." in task_table(report, AVERAGE)[2]
    assert [line.split(" | ")[-2:] for line in summary(report) if line.startswith("| own ")] == [["–", "– |"]]
    without_rdrop = [run for run in [*make_runs(), *others] if run["arm"] != "rdrop"]
    assert make_report(without_rdrop, METRICS, [*ARMS, "own"]).average == []


def test_time_is_the_processors_on_a_cpu_and_the_walls_elsewhere():
    def ratio(base, arm):
        runs = [make_run("ner", "baseline", 0, 0.5, 10.0, **base), make_run("ner", "rdrop", 0, 0.6, 40.0, **arm)]
        cost = make_report(runs, METRICS, ARMS).of_task("ner")["rdrop"].cost
        return cost.clock, cost.time

    cpu = {"device": "cpu", "train_cpu_seconds": 8.0}
    assert ratio(cpu, cpu | {"train_cpu_seconds": 16.0}) == ("CPU", 2.0)
    assert ratio(cpu, cpu | {"device": "cuda"}) == ("wall", 4.0)
    assert ratio(cpu, {"device": "cpu"}) == ("wall", 4.0)
    assert ratio({}, {}) == ("wall", 4.0)
    # A run of another machine, without its times, says nothing of the clock.
    runs = [make_run("ner", arm, seed, 0.5, 10.0, **cpu) for arm in ("baseline", "rdrop") for seed in range(2)]
    for name in ("train_runtime", "train_cpu_seconds"):
        del runs[-1]["metrics"][name]
    cost = make_report(runs, METRICS, ARMS).of_task("ner")["rdrop"].cost
    assert (cost.clock, cost.time) == ("CPU", 1.0)


def test_ratios_are_medians_of_pairs_and_what_was_not_measured_is_none():
    seconds = ((10, 30), (10, 20), (20, 30))  # ratios 3, 2, 1.5; of the sums 2
    runs = [make_run("ner", "baseline", s, 0.5, a, train_peak_memory_mib=100) for s, (a, _) in enumerate(seconds)]
    runs += [make_run("ner", "rdrop", s, 0.6, b) for s, (_, b) in enumerate(seconds)]
    row = make_report(runs, METRICS, ARMS).of_task("ner")["rdrop"]
    assert row.cost == Cost(time=2.0, clock="wall", examples_per_second=None, memory=None)
    assert row.gain_per_cost == pytest.approx(10.0)  # 10 points for once more the time
    for run in runs:
        del run["metrics"]["train_runtime"]
    row = make_report(runs, METRICS, ARMS).of_task("ner")["rdrop"]
    assert row.cost.time is None and row.gain_per_cost is None


@pytest.mark.parametrize("time", [0.8, 1.0, 1 + MIN_EXTRA_COST / 2])
def test_no_gain_per_cost_without_extra_cost(time):
    gain = make_report(make_runs(), METRICS, ARMS).of_task("ner")["rdrop"].gain
    assert gain_per_cost(gain, Cost(time, "wall", None, None)) is None


def test_share_kept_is_of_rdrops_gain_and_only_where_there_is_one():
    report = make_report(make_runs(), METRICS, ARMS)
    assert report.of_task("ner")["rdrop-shared"].share_kept == pytest.approx((3 + 1 + 2) / (5 + 4 + 2))
    assert report.of_task("mt")["rdrop-shared"].share_kept is None  # R-Drop has lost
    assert (
        report.of_task("ner")["rdrop"].share_kept is None and report.of_task("ner")["baseline-2x"].share_kept is None
    )


def test_other_metrics_are_kept_and_what_is_no_score_is_not():
    runs = [
        make_run("ner", "baseline", 0, 0.5, eval_loss=0.7, eval_ece=0.1, eval_samples=9, eval_samples_per_second=3)
    ]
    assert make_report(runs, METRICS, ARMS).rows[0].secondary == {"eval_loss": {0: 0.7}, "eval_ece": {0: 0.1}}


def test_trials_are_means_over_seeds_without_settings_that_failed():
    trials = [{"settings": {"lr": lr}, "score": score} for lr, score in ((1, 0.2), (2, 0.5), (1, 0.4), (2, None))]
    assert trial_scores(trials) == [({"lr": 1}, pytest.approx(0.3))]
