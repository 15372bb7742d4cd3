"""The text of a comparison, cell by cell for known runs."""

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from comparison.figures import make_report
from comparison.report import as_json, markdown, terminal_table
from comparison.statistics import bootstrap_interval
from support.comparison_data import ARMS, METRICS, make_choices, make_run, make_runs


def cells(text, heading, arm, task=None):
    """The cells of the first row of a table with this arm, under a heading."""
    for line in text.split(f"## {heading}\n", 1)[1].split("\n## ")[0].splitlines():
        row = [cell.strip() for cell in line.strip("|").split("|")]
        if arm in row[:2] and (task is None or row[0] == task):
            return row
    raise AssertionError(f"no row {arm} under {heading}")


@pytest.fixture
def text():
    return markdown(make_report(make_runs(), METRICS, ARMS), {}, {}, {})


def test_gains_are_shown_and_losses_like_them(text):
    # ner: 55, 64, 57 beside 50, 60, 55. Mean 58.67, std 4.73; differences 5, 4, 2.
    row = cells(text, "ner", "rdrop")
    low, high = bootstrap_interval([5.0, 4.0, 2.0])
    assert row[:4] == ["rdrop", "3", "58.67 ± 4.73", f"+3.67 [{low:+.2f}, {high:+.2f}]"]
    # t = 3.667 / (1.528 / sqrt 3) = 4.158; p = 1 - t / sqrt(2 + t^2). Of the 9 pairs 6 are won and one is tied.
    t = 11 / 3 / math.sqrt(7 / 9)
    assert row[4] == f"{1 - t / math.sqrt(2 + t * t):.3f}" and row[6:] == ["72%", "1.90x"]
    row = cells(text, "mt", "rdrop")
    assert row[2] == "20.17 ± 1.04" and row[3].startswith("-0.83 [-1.00, -0.") and row[6] == "28%"
    assert cells(text, "ner", "baseline") == ["baseline", "3", "55.00 ± 5.00", "–", "–", "–", "–", "1.00x"]


def test_summary_has_all_arms_tasks_and_the_average(text):
    assert "| arm | ner (f1) | mt (bleu) | average | average gain [95%] |" in text
    row = cells(text, "Summary", "rdrop")
    assert row[:4] == ["rdrop", "58.67 ± 4.73", "20.17 ± 1.04", "39.42 ± 2.65"] and row[4].startswith("+1.42 [+0.50")
    assert "Mean by seed over ner, mt." in text


def test_a_loss_is_said_to_be_one():
    runs = [
        {"task": "lm", "arm": arm, "seed": seed, "metrics": {"eval_perplexity": value + seed}}
        for arm, value in (("baseline", 30.0), ("rdrop", 28.5))
        for seed in range(3)
    ]
    report = make_report([*make_runs(), *runs], {**METRICS, "lm": "eval_perplexity"}, ARMS)
    text = markdown(report, {}, {}, {})
    assert "| lm (perplexity, lower is better) |" in text and "| perplexity, lower is better |" in text
    row = cells(text, "lm", "rdrop")  # better by 1.5 with each seed, but seeds differ more: 7 of 9 pairs, one tied
    assert row[2:4] == ["29.50 ± 1.00", "+1.50"] and row[6] == f"{8 / 9:.0%}"
    assert cells(text, "Best, worst and spread over seeds", "rdrop", "lm")[3:5] == ["28.50", "30.50"]
    assert "Left out, because an arm lacks a seed, or lower is better: lm." in text
    assert "Where lower is better, a gain is how much lower an arm is" in text
    only_scores = markdown(make_report(make_runs(), METRICS, ARMS), {}, {}, {})
    assert "ower is better" not in only_scores
    console = Console(width=80, file=io.StringIO())
    console.print(terminal_table(report))
    assert "perplexity, lower is better" in console.file.getvalue()


def test_controls_costs_and_the_best_seed(text):
    row = cells(text, "Against the controls", "rdrop", "ner")
    assert row == ["ner", "rdrop", "+3.00", "baseline-2x", "+3.00", "–", "–"]  # 3 points in each seed: no interval
    row = cells(text, "Cost", "rdrop-shared", "ner")
    assert row[2:6] == ["1.30x", "1.00x", "–", "wall"] and row[7:] == ["+6.67", "55%"]  # 2 / 0.3; 6 of 11 points
    assert cells(text, "Cost", "rdrop-shared", "mt")[8] == "–"  # R-Drop has lost: there is nothing to keep
    row = cells(text, "Best, worst and spread over seeds", "rdrop", "ner")
    assert row[2:7] == ["3", "64.00", "55.00", "4.73", "0.95x"]
    assert "must not be compared with a mean" in text
    assert cells(text, "Other metrics", "rdrop") == ["rdrop", "0.6000 ± 0.1000"]


def test_a_significant_gain_is_marked_and_others_are_not():
    gains = {"rdrop": (3.0, 3.1, 2.9, 3.05, 2.95), "rdrop-shared": (0.1, -0.3, 0.4, 0.0, 0.2)}
    runs = [make_run("mt", "baseline", seed, 20.0 + seed) for seed in range(5)]
    runs += [make_run("mt", arm, s, 20.0 + s + g) for arm, of_arm in gains.items() for s, g in enumerate(of_arm)]
    report = make_report(runs, METRICS, ARMS)
    text = markdown(report, {}, {}, {})
    assert cells(text, "mt", "rdrop")[5] == "**<0.001**" and "**" not in "".join(cells(text, "mt", "rdrop-shared"))
    console = Console(width=80, file=io.StringIO())
    console.print(terminal_table(report))
    marked = [line for line in console.file.getvalue().splitlines() if "*" in line]
    assert len(marked) == 1 and "rdrop " in marked[0] and "<0.001 *" in marked[0]


def test_one_seed_has_no_spread_no_interval_and_no_test():
    runs = [make_run("mt", "baseline", 0, 20.0), make_run("mt", "rdrop", 0, 19.0, 18.0)]
    text = markdown(make_report(runs, METRICS, ARMS), {}, {}, {})
    assert cells(text, "mt", "rdrop") == ["rdrop", "1", "19.00", "-1.00", "–", "–", "0%", "1.80x"]
    assert "Best, worst" not in text and "## Average" not in text and "nan" not in text and "75%" not in text


@pytest.mark.parametrize(("seeds", "share"), [(3, "75%"), (5, "93.8%")])
def test_the_limit_of_the_interval_is_said(seeds, share):
    runs = [make_run("mt", arm, s, 20.0 + s * len(arm)) for arm in ("baseline", "rdrop") for s in range(seeds)]
    assert f"with {seeds} seeds at most {share} of such intervals" in markdown(
        make_report(runs, METRICS, ARMS), {}, {}, {}
    )


def test_seeds_are_counted_in_words_and_the_limit_is_said_beside_a_task_of_one_seed():
    alone = [make_run("mt", arm, 0, 20.0) for arm in ("baseline", "rdrop")]
    text = markdown(make_report(alone, METRICS, ARMS), {}, {}, {})
    assert "- 1 seed for each task and arm." in text and "With 1 seed a gain" in text and "such intervals" not in text
    with_three = [make_run("ner", arm, s, 0.2 + s / 10 * len(arm)) for arm in ("baseline", "rdrop") for s in range(3)]
    text = markdown(make_report([*alone, *with_three], METRICS, ARMS), {}, {}, {})
    assert "- 1 to 3 seeds for each task and arm." in text and "with 3 seeds at most 75% of such intervals" in text


def test_what_was_compared_chosen_and_failed():
    runs = make_runs()
    runs[0]["metrics"]["eval_f1"] = math.nan
    about = {"data": "own.jsonl", "seeds": [0, 1, 2], "versions": {"torch": "2.13", "scipy": "1.17"}}
    failed = {"mt / rdrop / seed 3": "exit status 1; the end of log.txt:\nValueError: no | such file"}
    choices = make_choices() | {("ner", "not-trained"): {"settings": {"own": 1}, "trials": []}}
    text = markdown(make_report(runs, METRICS, ARMS), about, choices, failed, [Path("x/gains.png")])
    assert "- data: own.jsonl\n- seeds: 0, 1, 2\n- versions\n  - torch: 2.13\n  - scipy: 1.17\n" in text
    assert "![gains](gains.png)" in text
    assert "| task | arm | dropout | rdrop_alpha | trials | score there |" in text
    assert cells(text, "Settings", "baseline") == ["ner", "baseline", "0.2", "–", "3", "44.00"]
    assert cells(text, "Settings", "rdrop") == ["ner", "rdrop", "0.1", "2", "6", "60.00"]
    assert cells(text, "Settings", "rdrop-shared") == ["ner", "rdrop-shared", "0.1", "2", "as rdrop", "–"]
    assert "did not have the same number on ner" in text  # 3 and 6: a reader has to know
    assert "on ner. –: the arm has none, or its own arguments say it." in text
    assert "- ner / baseline / seed 0: the score is nan; no figure contains it." in text
    assert (
        "- mt / rdrop / seed 3:\n\n      exit status 1; the end of log.txt:\n      ValueError: no | such file" in text
    )


def test_an_equal_budget_and_none_are_said():
    choices = make_choices()
    choices["ner", "rdrop"]["trials"] = choices["ner", "rdrop"]["trials"][:3]
    report = make_report(make_runs(), METRICS, ARMS)
    assert "Every arm had as many." in markdown(report, {}, choices, {})
    given = {("ner", "rdrop"): {"settings": {"rdrop_alpha": 1.0}, "trials": []}}
    assert "Nothing was tuned" in markdown(report, {}, given, {})
    assert "## Settings" not in markdown(report, {}, {}, {}) and "## Runs that failed" not in markdown(
        report, {}, {}, {}
    )


def test_a_report_of_nothing():
    report = make_report([], METRICS, ARMS)
    text = markdown(report, {"data": "x"}, {}, {"mt / rdrop / seed 0": "killed"})
    assert "No run has a score." in text and "killed" in text
    Console(file=io.StringIO()).print(terminal_table(report))


def test_terminal_table_fits_80_columns():
    runs = [dict(run, arm=run["arm"].replace("shared", "shared-trunk")) for run in make_runs()]
    arms = [arm.replace("shared", "shared-trunk") for arm in ARMS]
    console = Console(width=80, file=io.StringIO())
    console.print(terminal_table(make_report(runs, METRICS, arms)))
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    assert "58.67 ± 4.73  +3.67 [+" in text and "rdrop-shared-trunk" in text and "average" in text


def test_json_has_every_figure():
    runs = make_runs()
    runs[3]["metrics"]["eval_f1"] = math.nan
    runs[-1]["metrics"]["eval_loss"] = math.inf
    report = make_report(runs, METRICS, ARMS)
    values = json.loads(json.dumps(as_json(report), allow_nan=False))
    assert values == as_json(report)
    row = next(row for row in values["rows"] if (row["task"], row["arm"]) == ("ner", "rdrop"))
    assert row["scores"] == pytest.approx({"0": 55, "1": 64, "2": 57}) and row["cost"]["time"] == pytest.approx(1.9)
    assert row["differences"]["baseline"]["values"] == pytest.approx([5, 4, 2])
    assert len(row["differences"]["baseline"]["interval"]) == 2
    assert values["without_score"] == {"ner / baseline-2x / seed 0": "nan"}
    assert values["rows"][-1]["secondary"]["eval_loss"]["2"] == "inf"
