"""Read measurements beside a training run for its model card: comparison with the baseline, and consistency.

The format of comparison.json, which scripts/compare.py writes, is owned here (`FORMAT`, `check_format`). An object of

- `format`: its number; files from before it had one are format 1.
- `about`: text and settings of the comparison; `tasks`, its commands by task; settings (`arms`) by name.
- `rows`: a result for each task and arm, in the order of the report: `task`, `metric`, `lower_is_better` (if true),
  `arm`, `scores` (points by seed), `mean`, `std` (n - 1), `best`, `worst`; `differences` by the arm compared with
  (`against`, `seeds`, `values`, `mean`, `interval` of 95% or null, `p_value`, `probability`, `holm`), `best_control`,
  `spread_ratio`, `spread_p`, `cost` (`time` and `memory` over the baseline's, `clock` "CPU" or "wall",
  `examples_per_second`; null where not measured), `gain_per_cost`, `share_kept`, `secondary` (other metrics by seed).
- `average`: such rows over the tasks in `averaged`; `not_averaged`, `without_score` and `failed` name the rest.
- `choices`: `task`, `arm`, the chosen `settings` and the `trials` they were chosen from.
- `runs`, `trials`: `task`, `arm`, `seed`, `arguments` of the script, final `metrics`, `history` as columns by log key.

Numbers are floats in JSON, scores in points (times 100) unless the metric is a loss.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from .markdown import NOTHING, inline, number, spread, table

#: The format of comparison.json that is written, and the newest that is read.
FORMAT = 1

# Errors of a broken file where its figures are read.
_BROKEN = (KeyError, TypeError, AttributeError, IndexError, ValueError)


def _load(source: Any, what: str, advice: str) -> dict[str, Any]:
    if isinstance(source, Mapping):
        return dict(source)
    if not isinstance(source, (str, Path)):
        raise ValueError(f"{what} is of type {type(source).__name__}, which says nothing: give {advice}.")
    path = Path(source)
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        problem = (
            f"cannot be read ({error.strerror})" if isinstance(error, OSError) else f"is malformed JSON ({error})"
        )
        raise ValueError(f"{what} {path} {problem}: give {advice}. The card is as it was.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{what} {path} holds no JSON object: give {advice}. The card is as it was.")
    return found


def _checked(read: Callable[[], dict[str, Any]], what: str, advice: str) -> dict[str, Any]:
    try:
        return read()
    except _BROKEN as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{what} is not complete ({reason}): give {advice}. The card is as it was.") from error


# ---- The comparison with the baseline ----


def check_format(found: Mapping[str, Any], what: str = "the comparison") -> None:
    """Raise `ValueError` unless the content of a comparison.json has a known format; `what` names it."""
    number = found.get("format", 1)
    if not isinstance(number, int):
        raise ValueError(f"{what} is no comparison.json of compare.py: its format is {number!r}, no number.")
    if number > FORMAT:
        raise ValueError(
            f"{what} has format {number}, and this hf_rdrop reads formats up to {FORMAT}: update it, or its figures "
            "could be taken for others."
        )


_COMPARISON = "the comparison.json that scripts/compare.py has written, or its content"


def read_comparison(source: Any, names: Iterable[str] = ()) -> dict[str, Any] | None:
    """Read the settings (arms) of a comparison on one task, for the card.

    Args:
        source: a comparison.json or its content, None for none; or a pair of that and the name of the task.
        names: of the model or its data, to choose among several tasks.

    Raises:
        ValueError: it cannot be read, holds no finished run, or it is open which task is meant.
    """
    if source is None:
        return None
    wanted = None
    if isinstance(source, (tuple, list)) and 1 <= len(source) <= 2:
        source, wanted = (*source, None)[:2]
    found = _load(source, "the comparison", _COMPARISON)
    check_format(found)
    rows = found.get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) and "task" in row for row in rows):
        raise ValueError(f"the comparison has no rows with tasks: give {_COMPARISON}. The card is as it was.")
    if not rows:
        raise ValueError(
            "no run of the comparison has finished, so there is nothing to show: finish it, or leave it out. The card "
            "is as it was."
        )
    task = _choose_task(list(dict.fromkeys(row["task"] for row in rows)), wanted, names)
    chosen = [row for row in rows if row["task"] == task]
    return _checked(lambda: comparison_part(chosen), "the comparison", _COMPARISON)


def _choose_task(tasks: list[str], wanted: Any, names: Iterable[str]) -> str:
    if wanted is None and len(tasks) == 1:
        return tasks[0]
    words = {_plain(word) for name in names for word in (name, *re.split(r"[\s/,.:_-]+", name))}
    fitting = [task for task in tasks if (task == wanted if wanted is not None else _plain(task) in words)]
    if len(fitting) == 1:
        return fitting[0]
    why = f"has no task {wanted!r}" if wanted is not None else "has several tasks, and none is named as this model's"
    raise ValueError(
        f"the comparison {why}: give it as a pair with the name of one, comparison=(comparison, {tasks[0]!r}) or "
        f"--card_comparison FILE {tasks[0]}. There are {', '.join(tasks)}. The card is as it was."
    )


def _plain(name: str) -> str:
    return re.sub(r"\W|_", "", name.lower())


def comparison_part(rows: list[Mapping[str, Any]]) -> dict[str, Any]:
    """Put the rows that comparison.json has of one task into a table."""
    cells = []
    for row in rows:
        found = row["differences"].get("baseline")
        cost = row["cost"]
        ratios = [NOTHING if cost[name] is None else f"{cost[name]:.2f}x" for name in ("time", "memory")]
        score = spread(row["mean"], row["std"])
        cells.append([inline(row["arm"]), str(len(row["scores"])), score, _gain(found), *ratios])
    metric = rows[0]["metric"].removeprefix("eval_").replace("_", " ")
    numbers = sorted({len(row["scores"]) for row in rows})
    is_loss = rows[0].get("lower_is_better", False)
    difference = "gain over baseline [95%]" if is_loss else "difference to baseline [95%]"
    columns = ["arm", "seeds", inline(metric) + ", lower is better" * is_loss, difference, "time", "memory"]
    return {
        "task": rows[0]["task"],
        "metric": metric,
        "is_loss": is_loss,
        "table": table(columns, cells),
        "seeds": str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}",
        # n differences lie all on one side of their true mean with probability 2^(1-n), if spread evenly around it
        "coverage": f"{100 - 200 / 2 ** numbers[0]:.3g}" if 3 <= numbers[0] <= 5 else None,
        "clock": "processor seconds" if rows[0]["cost"]["clock"] == "CPU" else "wall time",
    }


def _gain(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return NOTHING
    interval = found["interval"]
    return f"{found['mean']:+.2f}" + (f" [{interval[0]:+.2f}, {interval[1]:+.2f}]" if interval else "")


# ---- Consistency ----

_CONSISTENCY = (
    "an hf_rdrop.Consistency, its to_dict(), or a consistency.json of the training scripts or consistency.py"
)


def read_consistency(source: Any) -> dict[str, Any] | None:
    """Read results of `measure_consistency` for the card.

    Args:
        source: a `Consistency`, its `to_dict()`, a consistency.json (of one model, by data set, or of several models),
            or its content; None for none.

    Raises:
        ValueError: it cannot be read, or holds no measurement.
    """
    if source is None:
        return None
    # (By its method and not by its class, whose import would load torch for whoever reads a file.)
    found = source.to_dict() if hasattr(source, "to_dict") else _load(source, "the consistency", _CONSISTENCY)
    return _checked(lambda: _consistency_part(found), "the consistency", _CONSISTENCY)


def _consistency_part(found: Mapping[str, Any]) -> dict[str, Any]:
    measured: dict[str, Any]
    if "num_samples" in found and "scores" in found:
        measured = {"": found}
    elif "models" in found:
        sets = {name for of_model in found["models"].values() for name in of_model}
        measured = {
            model if len(sets) == 1 else f"{model}, {name}": values
            for model, of_model in found["models"].items()
            for name, values in of_model.items()
        }
    else:
        measured = dict(found) if len(found) > 1 else {"": next(iter(found.values()), None)}
    named = len(measured) > 1
    scores, distances = [], []
    for name, values in measured.items():
        first = [inline(name)] if named else []
        for score, of_score in values["scores"].items():
            sub_models = spread(of_score["mean"], of_score["std"], ".4f")
            whole, ensemble = f"{of_score['dropout_off']:.4f}", f"{of_score['ensembles'][-1]:.4f}"
            scores.append([*first, inline(score.replace("_", " ")), whole, sub_models, ensemble])
        kl = values["between_sub_models"], values["to_dropout_off"], values["ensembles_to_dropout_off"][-1]
        distances.append([*first, f"{values['items']:,}", str(values["num_samples"]), *map(number, kl)])
    head = ["model" if "models" in found else "data"] if named else []
    is_kl = all("accuracy" in values["scores"] for values in measured.values())
    pairs = ("between sub-models", "sub-model to dropout off", "ensemble to dropout off")
    return {
        "scores": table([*head, "score", "dropout off", "sub-models", "ensemble"], scores),
        "distances": table([*head, "items", "sub-models", *pairs], distances),
        "distance": "Symmetric KL divergence in nats" if is_kl else "Squared difference of the predictions",
        "several_models": "models" in found and named,
    }
