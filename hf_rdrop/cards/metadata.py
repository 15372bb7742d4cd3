"""Check and complete the metadata of a model card, with results that the Hub can read."""

import math
import re
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from transformers import TrainingArguments
from transformers.modelcard import TrainingSummary

from .markdown import is_hub_id, last_part, public

TAG = "r-drop"
_SAME_NAMES = (
    *("accuracy", "f1", "precision", "recall", "matthews_correlation", "roc_auc", "exact_match", "perplexity"),
    *("mse", "mae", "pearsonr", "spearmanr", "bleu", "sacrebleu", "chrf", "ter", "meteor", "wer", "cer"),
)
#: The Hub's names of an evaluation's metrics; others (loss, ece, ...) are not among its metrics.
HUB_METRICS = {
    **{name: name for name in _SAME_NAMES},
    **dict.fromkeys(("rouge", "rouge1", "rouge2", "rougeL", "rougeLsum"), "rouge"),
    **dict.fromkeys(("f1_macro", "f1_micro"), "f1"),
    **{"pearson": "pearsonr", "spearman": "spearmanr", "brier": "brier_score"},
}
# Names that `datasets` gives to data sets read from files or made in memory.
FILES = frozenset({"arrow", "csv", "generator", "json", "pandas", "parquet", "sql", "text", "webdataset", "xml"})


def as_list(value: Any) -> list[str]:
    """List what may be None, one string, or several, without those that are None."""
    return [value] if isinstance(value, str) else [item for item in value or () if item is not None]


def find_title(args: TrainingArguments, summary: TrainingSummary, base_name: str) -> str:
    """Find the model's name: never more than the last component of a path."""
    hub_id, folder = args.hub_model_id or "", str(args.output_dir)
    candidates = (str(summary.model_name or ""), hub_id, folder, str(Path(folder).resolve()), base_name)
    return next(filter(None, map(last_part, candidates)), "model")


def fill_in(
    data: ModelCardData,
    summary: TrainingSummary,
    evaluation: Mapping[str, Any] | None,
    title: str,
    base_name: str,
    task: str | None,
    *,
    more_tags: Sequence[str],
    with_rdrop: bool,
) -> None:
    """Complete the base class's metadata in place, and remove what is no name on the Hub.

    Args:
        data, summary: the base class's metadata and summary of the training.
        evaluation: as `last_evaluation` finds it.
        title, base_name: names of the model and of the one that training began with, or "".
        task: the Hub's name of the task, where the summary has none.
        more_tags, with_rdrop: tags to add, and whether the model was trained with R-Drop.
    """
    tags = {tag for tag in (*as_list(data.tags), *more_tags) if _is_public(tag)} - {TAG}
    data.tags = sorted(tags | {TAG} if with_rdrop else tags)
    data.base_model = base_name if is_hub_id(base_name) else None
    data.datasets = [name for name in as_list(data.datasets) if is_hub_id(name) and name not in FILES] or None
    metrics = evaluation["metrics"] if evaluation else {}
    found = {name: float(value) for name, value in metrics.items() if name in HUB_METRICS and _is_finite(value)}
    data.metrics = list(dict.fromkeys(HUB_METRICS[name] for name in found)) or None
    data.eval_results = _eval_results(data, task, summary, found) or None
    data.model_name = title if data.eval_results else None


def _is_public(tag: str) -> bool:
    """Tell whether a tag names no folder; PEFT names the base model in one (base_model:adapter:NAME)."""
    return is_hub_id(tag.rpartition(":")[2]) if tag.startswith("base_model:") else public(tag) == tag


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _eval_results(
    data: ModelCardData, task: str | None, summary: TrainingSummary, metrics: Mapping[str, float]
) -> list[EvalResult]:
    """List results for a `model-index`; none unless the task and the one data set are known."""
    tasks, names = as_list(summary.tasks) or as_list(task), as_list(data.datasets)
    if not tasks or len(names) != 1:
        return []
    metadata: Any = summary.dataset_metadata  # a list, whatever its annotation says
    about = metadata[0] if metadata else {}
    config = about.get("config") or next(iter(as_list(summary.dataset_args)), None)
    split = about.get("split")
    return [
        EvalResult(
            task_type=tasks[0],
            task_name=tasks[0].replace("-", " ").capitalize(),
            dataset_type=names[0],
            dataset_name=next((public(name) for name in as_list(summary.dataset)), names[0]),
            dataset_config=config if re.fullmatch(r"[\w.-]+", config or "") else None,
            dataset_split=None if split == "None" else split,
            metric_type=HUB_METRICS[metric],
            metric_name=metric,
            metric_value=value,
        )
        for metric, value in metrics.items()
    ]
