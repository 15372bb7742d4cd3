"""Write the model card of a training run."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from transformers import FeatureExtractionMixin, PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.image_processing_base import ImageProcessingMixin
from transformers.modelcard import TrainingSummary

from ..files import write_atomically
from ..training.settings import RunFacts
from ..version import __version__
from .evidence import read_comparison, read_consistency
from .facts import CLASSIFIERS, HeadFacts, hyperparameters, rdrop_part, trained_head, versions
from .history import curves_part, last_evaluation, plot_curves
from .markdown import inline, is_hub_id, last_part, link, number, public, render, table
from .metadata import FILES, as_list, fill_in, find_title

PLOT = "rdrop_curves.png"


def write_card(
    trainer: Trainer,
    base_card: Callable[..., None],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    facts: RunFacts,
    *,
    comparison: Any = None,
    consistency: Any = None,
) -> None:
    """Write README.md (and, with matplotlib, rdrop_curves.png) into the trainer's `output_dir`.

    The metadata are those of the base class, with the tag `r-drop` unless `rdrop_alpha` is 0, the tags of an earlier
    README, metrics under the Hub's names, and a `model-index` where a task, a data set with a name, and finite scores
    are known. Paths of this machine are cut to their last component. The README is replaced at once.

    Args:
        trainer: on the process that writes.
        base_card: the base class's `create_model_card`, bound to the trainer.
        args, kwargs: its arguments, which are not changed.
        facts: what was in force in the training run.
        comparison: a comparison.json of compare.py (path or content), shown for its only task or the one named as the
            data set or the model; or a pair of it and the name of the task.
        consistency: a `Consistency`, its dict, or a consistency.json (path or content).

    Raises:
        ValueError: one of the two, or the front matter of an earlier README, cannot be read; nothing was written.
    """
    given = _by_name(base_card, args, kwargs)
    evidence = check_evidence(trainer.args, comparison=comparison, consistency=consistency, **given)
    readme = Path(str(trainer.args.output_dir)) / "README.md"
    earlier_tags = as_list(_read(readme).tags)
    model = trainer.accelerator.unwrap_model(trainer.model)
    with_peft = hasattr(model, "create_or_update_model_card")
    with _output_elsewhere(trainer) as folder:
        # Copies, because the base class adds tags to the caller's list.
        base_card(*map(_copied, args), **{name: _copied(value) for name, value in kwargs.items()})
        data = _read(folder / "README.md")
        if with_peft:  # the base class asks for PEFT's metadata only where PEFT has written a README before
            earlier_tags += as_list(data.tags)  # PEFT replaces them
            model.create_or_update_model_card(str(folder))
            data = _read(folder / "README.md")

    # A licence is given, so that it is not looked up on the Hub once more.
    known = inspect.signature(TrainingSummary.from_trainer).parameters
    summary = TrainingSummary.from_trainer(
        trainer, **{key: value for key, value in given.items() if key in known and key != "tags"} | {"license": "-"}
    )
    evaluation, head, state = last_evaluation(trainer.state, trainer.args), trained_head(facts), trainer.state
    base_name = str(given.get("finetuned_from") or getattr(facts.model.config, "_name_or_path", "") or "")
    title = find_title(trainer.args, summary, base_name)
    tags, with_rdrop = [*earlier_tags, *as_list(given.get("tags"))], bool(facts.settings.alpha)
    fill_in(data, summary, evaluation, title, base_name, head.task, more_tags=tags, with_rdrop=with_rdrop)
    curves = curves_part(state.log_history, head, facts.settings.alpha, facts.settings.interval)
    if curves and facts.settings.alpha and plot_curves(state.log_history, head, readme.with_name(PLOT)):
        curves["plot"] = PLOT
    trained, smoothing = state.global_step > 0, trainer.args.label_smoothing_factor
    card = render(
        data,
        title=title,
        about=_about(facts.model, head, summary, data, base_name),
        evaluation=_evaluation_part(evaluation, state.global_step),
        usage=_usage(trainer, facts.model, head, title, base_name, with_peft),
        rdrop=rdrop_part(facts, head, state.log_history, trained=trained, label_smoothing=smoothing),
        curves=curves,
        hyperparameters=hyperparameters(trainer) if trained else None,
        versions=versions(with_peft),
        limitations={"seed": trainer.args.seed, "license": data.license},
        library=__version__,
        **evidence,
    )
    write_atomically(readme, str(card))


def check_evidence(
    args: TrainingArguments, *, comparison: Any = None, consistency: Any = None, **card: Any
) -> dict[str, Any]:
    """Read the card's comparison and consistency, as for `write_card`; also as a check before training.

    `card` holds the other arguments of `create_model_card`, for the names of the model and its data.

    Raises:
        ValueError: one of the two cannot be read, or it is open which task of the comparison is meant.
    """
    keys = ("dataset_args", "dataset", "dataset_tags", "model_name")
    names = [*(name for key in keys for name in as_list(card.get(key))), last_part(str(args.output_dir))]
    return {"comparison": read_comparison(comparison, names), "consistency": read_consistency(consistency)}


def _by_name(function: Callable[..., None], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    signature = inspect.signature(function)
    given: dict[str, Any] = {}
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        is_rest = signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
        given |= value if is_rest else {name: value}
    return given


@contextmanager
def _output_elsewhere(trainer: Trainer) -> Iterator[Path]:
    """Set another `output_dir` within the block, as an upload may be reading the real one in the background."""
    output_dir = trainer.args.output_dir
    with TemporaryDirectory() as parent:
        folder = Path(parent) / (Path(str(output_dir)).resolve().name or "model")
        folder.mkdir()
        trainer.args.output_dir = str(folder)
        try:
            yield folder
        finally:
            trainer.args.output_dir = output_dir


def _copied(value: Any) -> Any:
    return list(value) if isinstance(value, list) else value


def _read(readme: Path) -> ModelCardData:
    """Read the metadata of a README, if there is one."""
    if not readme.is_file():
        return ModelCardData()
    try:
        return ModelCard.load(readme).data
    except (ValueError, TypeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{readme} begins with metadata that cannot be read ({reason}). Their tags were to be kept: repair what "
            "stands between the lines of ---, or remove the file. Nothing was changed."
        ) from error


# ---- Parts of the body ----


def _about(
    model: Any, head: HeadFacts, summary: TrainingSummary, data: ModelCardData, base_name: str
) -> dict[str, Any]:
    task = next(iter(as_list(summary.tasks)), head.task)
    tags, names = as_list(data.datasets), [name for name in as_list(summary.dataset) if name not in FILES]
    shown = [inline(public(name)) for name in names]
    if len(tags) == len(names):
        shown = [f"[{name}](https://huggingface.co/datasets/{tag})" for name, tag in zip(shown, tags, strict=True)]
    return {
        "class": type(model).__name__,
        "base": link(base_name) if is_hub_id(base_name) else None,
        "local_base": None if is_hub_id(base_name) else last_part(base_name),
        "task": task.replace("-", " ") if task else None,
        "data": " and ".join(shown),
    }


def _evaluation_part(evaluation: Mapping[str, Any] | None, steps: int) -> dict[str, Any] | None:
    if evaluation is None:
        return None
    rows = [[inline(name.replace("_", " ")), number(value)] for name, value in evaluation["metrics"].items()]
    about = {"step": evaluation["step"], "steps": steps, "best": evaluation["best"]}
    return {"table": table(["metric", "value"], rows), **about}


def _usage(
    trainer: Trainer, model: Any, head: HeadFacts, title: str, base_name: str, with_peft: bool
) -> dict[str, Any] | None:
    if head.kind is None:
        return None
    hub_id = getattr(trainer, "hub_model_id", None) or trainer.args.hub_model_id
    return {
        "kind": head.kind,
        "problem": head.problem,
        "auto_class": head.auto_class,
        "name": hub_id or title,
        "on_hub": bool(hub_id),
        "processor": _auto_processor(trainer.processing_class),
        "mode": {1: "L", 4: "RGBA"}.get(getattr(model.config, "num_channels", 3), "RGB"),  # Pillow's
        "base": _base_for_adapter(model.config, head.kind, base_name) if with_peft else None,
    }


def _auto_processor(given: Any) -> str | None:
    """Name the class of transformers that loads the processor of the model's inputs."""
    kinds = {
        "AutoTokenizer": PreTrainedTokenizerBase,
        "AutoImageProcessor": ImageProcessingMixin,
        "AutoFeatureExtractor": FeatureExtractionMixin,
    }
    return next((name for name, kind in kinds.items() if isinstance(given, kind)), None)


def _base_for_adapter(config: Any, kind: str, base_name: str) -> dict[str, Any]:
    """Tell how to load the base model: an adapter does not hold the names of its classes."""
    options = ""
    if kind in (*CLASSIFIERS, "token"):
        labels = config.id2label
        own = len(labels) <= 20 and any(name != f"LABEL_{index}" for index, name in labels.items())
        options = f"id2label={labels!r}" if own else f"num_labels={len(labels)}"
    on_hub = is_hub_id(base_name)
    name = base_name if on_hub else last_part(base_name) or "base-model"
    return {"name": name, "on_hub": on_hub, "options": options}
