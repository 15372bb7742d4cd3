#!/usr/bin/env python
"""Fit the cost model's constants for a machine to what scripts/benchmark.py measured on it.

    python scripts/fit_cost_model.py outputs/benchmark/benchmark.json

Prints the constants for hf_rdrop/cost.py, and how far the predictions are from the measured ratios before and after.
"""

import argparse
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import transformers
from scipy.optimize import least_squares

from benchmarking.report import time_ratio
from benchmarking.steps import HEADS, PLAIN, Sizes, cost_settings, make_batch
from finetuning.command_line import cli
from hf_rdrop.cost import MACHINES, Machine, predict_cost
from hf_rdrop.cost.model_shape import ModelShape, describe_model

NOISE = 0.05  # what a measured ratio is usually off by: errors beyond it count less and less
START = 1.0  # how firmly constants that the measurements say little about keep their value


class Measured(NamedTuple):
    """An arm of the benchmark: the model's sizes, what `predict_cost` takes, and the ratio to the plain step."""

    shape: ModelShape
    settings: dict[str, Any]
    ratio: float


def measured_arms(groups: Sequence[dict[str, Any]]) -> list[Measured]:
    """Return the arms of training steps that the cost model predicts."""
    found = []
    for group in groups:
        arms = [name for name, arm in group["arms"].items() if arm.get("prediction")]
        if not arms:
            continue
        sizes = Sizes(**group["sizes"])
        shape = describe_model(HEADS[group["head"]].make_model(sizes), make_batch(group["head"], sizes, 0))
        if shape is None:
            raise ValueError(f"the sizes of the model for {group['head']} cannot be read.")
        for name in arms:
            settings = cost_settings(group["arms"][name]["settings"])
            found.append(Measured(shape, settings, time_ratio(group, name, PLAIN)))
    return found


def errors(arms: Sequence[Measured], machine: Machine) -> np.ndarray:
    """Logarithm of predicted over measured ratio, arm by arm."""
    predicted = [predict_cost(arm.shape, machine=machine, **arm.settings).time for arm in arms]
    return np.log(np.array(predicted) / np.array([arm.ratio for arm in arms]))


def fit(arms: Sequence[Measured], start: Machine) -> Machine:
    """Constants near `start` with the smallest errors, by robust least squares of their logarithms.

    Raises:
        ValueError: if there are fewer measurements than constants.
    """
    if len(arms) < len(start):
        raise ValueError(f"{len(arms)} measured arms are too few to fit {len(start)} constants to.")
    first = np.log(np.array(start))

    def residuals(logs: np.ndarray) -> np.ndarray:
        return np.concatenate((errors(arms, Machine(*np.exp(logs))) / NOISE, START * (logs - first)))

    return Machine(*np.exp(least_squares(residuals, first, loss="soft_l1").x))


def report(name: str, arms: Sequence[Measured], machine: Machine) -> None:
    """Write one line on a machine's constants and their errors."""
    size = np.abs(np.expm1(errors(arms, machine)))
    constants = ", ".join(f"{field}={value:.0f}" for field, value in machine._asdict().items())
    print(f"{name}: {constants}")
    print(f"  {len(arms)} arms: median error {np.median(size):.1%}, within 10% {(size <= 0.1).mean():.0%}", end="")
    print(f", largest {size.max():.0%}")


def main(argv: Sequence[str] | None = None) -> Machine:
    """Fit the constants to the files, print them, and return them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "files", nargs="+", metavar="benchmark.json", help="files that scripts/benchmark.py has written"
    )
    files = parser.parse_args(argv).files
    transformers.logging.set_verbosity_error()
    results = []
    for file in files:
        with open(file, encoding="utf-8") as stream:
            results.append(json.load(stream))
    if len({result["device_type"] for result in results}) > 1:
        raise ValueError("the files are of different kinds of devices, which have constants of their own.")
    arms = measured_arms([group for result in results for group in result["groups"]])
    start = MACHINES[results[0]["device_type"]]
    machine = fit(arms, start)
    report("now", arms, start)
    report("fitted", arms, machine)
    return machine


if __name__ == "__main__":
    cli(main)
