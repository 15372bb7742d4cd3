"""Sentences of a reference run's card on one arm: gain, cost and calibration beside the baseline."""

import re
import statistics
from collections.abc import Mapping, Sequence

from comparison.figures import Row
from comparison.statistics import SIGNIFICANT
from comparison.tables import gain, p_cell, scored_name, short_name, spread
from hf_rdrop.cards.markdown import code, inline


def in_words(row: Row, base: Row | None) -> str:
    """Put the figures of an arm into words: gain, cost and calibration beside the baseline."""
    arm, metric = code(row.arm), inline(scored_name(row.metric))
    if base is None or row.gain is None:
        return f"{arm}: {metric} {spread(row)}; no run of the baseline has the same seed."
    over = "" if row.scores.keys() == base.scores.keys() else _over_seeds(row.gain.seeds)
    words = [f"{arm}: {metric} {spread(row)} beside {spread(base)} of the baseline, {gain(row.gain)}{over}."]
    interval, p = row.gain.interval, row.gain.holm
    if interval is None:
        words.append("These runs give no interval: too few seeds, or equal differences.")
    elif interval.low <= 0 <= interval.high:
        words.append("The interval contains 0: no difference that these seeds can tell from chance.")
    else:
        words.append(f"The interval lies {'above' if interval.low > 0 else 'below'} 0.")
        if p is not None and p >= SIGNIFICANT:
            words.append(f"The paired t-test does not confirm it (p = {p_cell(p)}, Holm).")
    if row.cost.time is not None:
        memory = "" if row.cost.memory is None else f" and {row.cost.memory:.2f}x the peak memory"
        words.append(f"It took {row.cost.time:.2f}x the time{memory}.")
    names = [name for name in row.secondary if re.search(r"_(ece|nll|brier)$", name) and name in base.secondary]
    if told := [said for name in names if (said := _calibration(name, row.secondary[name], base.secondary[name]))]:
        words.append(f"Calibration (lower is better): {', '.join(told)}.")
    return " ".join(words)


def _over_seeds(seeds: Sequence[int]) -> str:
    which = f"over the {len(seeds)} seeds" if len(seeds) > 1 else f"with seed {seeds[0]}, the only one"
    return f" {which} that both have"


def _calibration(name: str, ours: Mapping[int, float], theirs: Mapping[int, float]) -> str:
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return ""
    lower = sum(ours[seed] < theirs[seed] for seed in seeds)
    mean, base = (statistics.fmean(scores[seed] for seed in seeds) for scores in (ours, theirs))
    return f"{short_name(name)} {mean:.3f} beside {base:.3f} (lower with {lower} of {len(seeds)} seeds)"
