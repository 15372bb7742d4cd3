"""Cost of an arm beside the baseline, and what it gains for that."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from comparison.statistics import Difference

# A time ratio closer to 1 than this is noise, and a gain divided by it would be too.
MIN_EXTRA_COST = 0.05


@dataclass(frozen=True)
class Cost:
    """Medians over seeds of the arm's figure over the baseline's with the same seed; None where it was not measured.

    Attributes:
        time: training time.
        clock: "CPU" when `time` is made of the processor seconds of the process, "wall" when of the time that passed;
            None without a time.
        examples_per_second: training examples in a second of wall time.
        memory: peak memory.
    """

    time: float | None
    clock: str | None
    examples_per_second: float | None
    memory: float | None


def cost_ratios(arm: Mapping[int, Mapping[str, Any]], base: Mapping[int, Mapping[str, Any]]) -> Cost:
    """Compute the cost of an arm on a task, from the metrics by seed of its runs and of the baseline's.

    The clock is the CPU's when all runs were on a CPU (`device`) and have `train_cpu_seconds`. Runs without any time
    do not count: those of another machine, say, whose times were taken out of their records.
    """
    pairs = [(arm[seed], base[seed]) for seed in sorted(arm.keys() & base.keys())]
    timed = [run for pair in pairs if all(run.get("train_runtime") for run in pair) for run in pair]

    def ratio(name: str) -> float | None:
        found = [ours[name] / theirs[name] for ours, theirs in pairs if ours.get(name) and theirs.get(name)]
        return statistics.median(found) if found else None

    # Processor seconds count what a run costs also while other runs wait for the same cores. On a GPU they do not
    # count what the GPU does.
    on_cpu = all(run.get("device") == "cpu" and run.get("train_cpu_seconds") for run in timed)
    time = ratio("train_cpu_seconds" if on_cpu else "train_runtime")
    speed, memory = ratio("train_samples_per_second"), ratio("train_peak_memory_mib")
    return Cost(time, None if time is None else "CPU" if on_cpu else "wall", speed, memory)


def mean_cost(costs: Sequence[Cost]) -> Cost:
    """Average the cost over several tasks: geometric means, because they are ratios; None if a task has none."""

    def mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return statistics.geometric_mean(known) if len(known) == len(values) else None

    clocks = sorted({cost.clock for cost in costs if cost.clock is not None})
    time, speed = mean([cost.time for cost in costs]), mean([cost.examples_per_second for cost in costs])
    return Cost(time, None if time is None else " and ".join(clocks), speed, mean([cost.memory for cost in costs]))


def gain_per_cost(gain: Difference | None, cost: Cost) -> float | None:
    """Gain over the baseline / (time ratio - 1): points for each extra training as long as the baseline's.

    None without a measured extra cost of at least `MIN_EXTRA_COST`.
    """
    if gain is None or cost.time is None or cost.time - 1 < MIN_EXTRA_COST:
        return None
    return gain.mean / (cost.time - 1)


def share_kept(gain: Difference | None, full: Difference | None) -> float | None:
    """Divide the arm's gain by full R-Drop's, on the seeds of both; None when R-Drop has gained nothing."""
    if gain is None or full is None:
        return None
    ours, whole = (dict(zip(found.seeds, found.values, strict=True)) for found in (gain, full))
    seeds = ours.keys() & whole.keys()
    total = math.fsum(whole[seed] for seed in seeds)
    return math.fsum(ours[seed] for seed in seeds) / total if total > 0 else None
