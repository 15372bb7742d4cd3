"""Report of a benchmark: ratios and tables, made from what benchmark.json holds."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.table import Table as RichTable

from benchmarking.loss import CLOSED_FORM, OFFICIAL
from benchmarking.loss import FUSED as FUSED_LOSS
from benchmarking.precision import FLOAT32, LOW, OURS
from benchmarking.steps import DOUBLED, FUSED, PLAIN, RDROP, TRUNK_3_4
from hf_rdrop.fused.head import MIN_VOCAB_SIZE
from reporting.markdown import table_lines

Group = Mapping[str, Any]
MIB = 2**20
AXES = {"vocab": "vocabulary", "length": "sequence length", "batch": "batch B", "layers": "layers L"}


class Table(NamedTuple):
    """A table as text, for the terminal and for markdown."""

    title: str
    note: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


# ---- Ratios ----


def time_ratio(group: Group, arm: str, base: str) -> float:
    """Median over the repeats of the arm's time over the other's in the same repeat."""
    pairs = zip(group["arms"][arm]["seconds"], group["arms"][base]["seconds"], strict=True)
    return statistics.median(seconds / other for seconds, other in pairs)


def memory_ratio(group: Group, arm: str, base: str) -> float:
    """Peak memory of one call over that of the other's, both beyond what was there before."""
    return group["arms"][arm]["peak_bytes"] / group["arms"][base]["peak_bytes"]


def _milliseconds(group: Group, arm: str) -> str:
    return _three_digits(1000 * statistics.median(group["arms"][arm]["seconds"]))


def _mebibytes(group: Group, arm: str) -> str:
    return _three_digits(group["arms"][arm]["peak_bytes"] / MIB)


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _percent(error: float) -> str:
    return f"{error:.2%}" if error < 0.1 else f"{error:.0%}"


def _predicted(group: Group, arm: str, quantity: str, measured: float) -> str:
    """Return the cost model's ratio, and its distance from what was measured."""
    value = group["arms"][arm].get("prediction", {}).get(quantity)
    return "" if value is None else f"{value:.2f} ({value / measured - 1:+.0%})"


# ---- Tables ----


def tables(results: Mapping[str, Any]) -> list[Table]:
    """Every table that the measured sections allow."""
    names = ("loss", "steps", "growth", "precision")
    by_section = {name: [g for g in results["groups"] if g["section"] == name] for name in names}
    made = [
        _loss_table(by_section["loss"]),
        _bandwidth_table(by_section["loss"]),
        *(_step_table(group) for group in by_section["steps"]),
        _growth_table(by_section["growth"]),
        _precision_table(by_section["precision"]),
        _limits_table(results),
    ]
    return [table for table in made if table.rows]


def _loss_table(groups: Sequence[Group]) -> Table:
    rows = []
    for group in groups:
        where = [str(group["rows"]), str(group["vocab"])]
        if not group["arms"]:
            rows.append([*where, f"left out: {group['left_out']}", *[""] * 7])
            continue
        ratios = [
            f"{ratio(group, OFFICIAL, arm):.2f}x"
            for arm in (CLOSED_FORM, FUSED_LOSS)
            for ratio in (time_ratio, memory_ratio)
        ]
        absolute = [_milliseconds(group, OFFICIAL), _mebibytes(group, OFFICIAL)]
        against = f"{time_ratio(group, FUSED_LOSS, CLOSED_FORM):.2f}"
        rows.append([*where, *absolute, *ratios, against, f"{max(group['differences'].values()):.0e}"])
    note = (
        "`faster`, `less memory`: the official formula's time and peak over this arm's. `fused / closed`: a ratio of "
        "times. `difference`: the largest relative difference of loss and gradients from the official formula's. "
        "No label is ignored."
    )
    columns = ["N", "V", "official ms", "MiB", "closed form faster", "less memory", "fused faster", "less memory"]
    return Table(
        "Loss stage: hidden states to loss and gradients", note, [*columns, "fused / closed", "difference"], rows
    )


def _bandwidth_table(groups: Sequence[Group]) -> Table:
    rows = []
    for group in groups:
        if "bandwidth" in group:
            elementwise, copy = group["bandwidth"]["elementwise"], group["bandwidth"]["copy"]
            share = f"{elementwise / copy:.0%}"
            rows.append(
                [f"{group['rows']} x {group['vocab']}", f"{elementwise / 1e9:.1f}", f"{copy / 1e9:.1f}", share]
            )
    note = "Outside its matrix products the fused head reads every logit and writes its gradient once, at the least."
    return Table("Memory bandwidth of the fused head", note, ["N x V", "fused GB/s", "copy GB/s", "share"], rows)


def _ratio_cells(group: Group, arm: str) -> list[str]:
    time, memory = time_ratio(group, arm, PLAIN), memory_ratio(group, arm, PLAIN)
    predictions = _predicted(group, arm, "time", time), _predicted(group, arm, "memory", memory)
    return [f"{time:.2f}", predictions[0], f"{memory:.2f}", predictions[1]]


def arm_label(group: Group, arm: str) -> str:
    shared = group["arms"][arm]["settings"].get("rdrop_shared_layers")
    return f"{arm} (k={shared})" if shared else arm


def _step_table(group: Group) -> Table:
    rows = [] if group["arms"] else [[f"left out: {group['left_out']}", *[""] * 7]]
    for arm in group["arms"]:
        time, time_model, memory, memory_model = _ratio_cells(group, arm)
        doubled = f"{time_ratio(group, arm, DOUBLED):.2f}"
        absolute = _milliseconds(group, arm), _mebibytes(group, arm)
        rows.append([arm_label(group, arm), absolute[0], time, time_model, doubled, absolute[1], memory, memory_model])
    columns = ["arm", "ms", "time / B", "model", "/ 2B", "MiB", "memory / B", "model"]
    note = (
        f"{_sizes(group)}. Ratios over the plain step with B rows, and with 2B rows. `model`: the cost model's "
        "prediction and its distance from the measurement."
        + (" Trunk and interval have the fused head, as with `auto`." if FUSED in group["arms"] else "")
    )
    return Table(f"Training step: {group['head']}", note, columns, rows)


def _sizes(group: Group) -> str:
    return ", ".join(f"{name} {value}" for name, value in group["sizes"].items())


def _growth_table(groups: Sequence[Group]) -> Table:
    rows = [
        [AXES[group["axis"]], str(group["value"]), arm_label(group, arm), *_ratio_cells(group, arm)]
        for group in groups
        for arm in group["arms"]
        if arm != PLAIN
    ]
    columns = ["axis", "value", "arm", "time / B", "model", "memory / B", "model"]
    return Table(
        "Growth", "One size at a time; the vocabulary in translation, the rest in classification.", columns, rows
    )


def _precision_table(groups: Sequence[Group]) -> Table:
    arms = (LOW, FLOAT32, OURS)
    rows = [
        [group["dtype"], str(group["classes"]), f"{group['errors']['kl']['exact']:.1e}"]
        + [_percent(group["errors"][arm][what]) for what in ("value", "gradient") for arm in arms]
        for group in groups
    ]
    note = (
        "Relative errors (of gradients by norm) beside float64 on the same logits of two passes, 1,024 rows. `KL`: "
        "theirs, in nats. `low`: the official formula in the logits' own precision, `float32`: the same after a cast. "
        "A gradient has the logits' precision, whose rounding alone is 0.17% in bfloat16 and 0.02% in float16."
    )
    columns = [f"{what}: {arm}" for what in ("value", "gradient") for arm in ("low", "float32", "ours")]
    return Table("Precision of the agreement", note, ["logits", "classes", "KL", *columns], rows)


def _limits_table(results: Mapping[str, Any]) -> Table:
    """Return the project's targets beside the worst that was measured."""
    groups = [group for group in results["groups"] if group["arms"]]
    steps = {group["head"]: group for group in groups if group["section"] == "steps"}
    loss = [group for group in groups if group["section"] == "loss"]
    cuda = results["device_type"] == "cuda"
    large = [group for group in loss if group["vocab"] >= (128000 if cuda else 32000)]
    faster, less = (3.0, 8.0) if cuda else (2.5, 4.0)
    where = f"loss stage, V >= {128 if cuda else 32}k"
    rows = []

    def at_least(what: str, limit: float, values: Sequence[float]) -> None:
        if values:
            rows.append([what, f">= {limit:g}", f"{min(values):.2f}", "yes" if min(values) >= limit else "no"])

    def at_most(what: str, limit: float, values: Sequence[float]) -> None:
        if values:
            rows.append([what, f"<= {limit:g}", f"{max(values):.2f}", "yes" if max(values) <= limit else "no"])

    at_least(f"{where}: official time / fused", faster, [time_ratio(g, OFFICIAL, FUSED_LOSS) for g in large])
    at_least(f"{where}: official memory / fused", less, [memory_ratio(g, OFFICIAL, FUSED_LOSS) for g in large])
    auto = [(group, FUSED_LOSS if group["vocab"] >= MIN_VOCAB_SIZE else CLOSED_FORM) for group in loss]
    at_most(
        "loss stage, every V: time of auto's choice / closed form", 1.0, [time_ratio(*a, CLOSED_FORM) for a in auto]
    )
    small = [time_ratio(*choice, OFFICIAL) for choice in auto if choice[0]["vocab"] <= 1000]
    at_most("loss stage, V <= 1000: time of auto's choice / official", 1.0, small)
    if (group := steps.get("translation")) and group["sizes"]["vocab"] >= 32000:
        at_most("translation: fused time / r-drop", 1.0, [time_ratio(group, FUSED, RDROP)])
        saved = group["arms"][RDROP]["peak_bytes"] - group["arms"][FUSED]["peak_bytes"]
        sizes = group["sizes"]
        logits = 2 * sizes["batch"] * sizes["length"] * sizes["vocab"] * 4
        at_least("translation: memory saved by fused / full logits in fp32", 1.0, [saved / logits])
    for head, group in steps.items():
        for arm in (RDROP, FUSED):
            if arm in group["arms"]:
                at_most(f"{head}: {arm} time / plain 2B", 1.03, [time_ratio(group, arm, DOUBLED)])
    if (group := steps.get("sequence-classification")) and group["sizes"]["layers"] == 12:
        for arm, limit in ((TRUNK_3_4, 1.30), ("trunk L-1", 1.15)):
            at_most(f"{arm} time / plain B, 12 layers", limit, [time_ratio(group, arm, PLAIN)])
    exactness = [group["errors"][OURS] for group in results["groups"] if group["section"] == "precision"]
    at_most("precision: largest error of the gradient, %", 0.2, [100 * errors["gradient"] for errors in exactness])
    for quantity, ratio in (("time", time_ratio), ("memory", memory_ratio)):
        errors = [
            abs(arm["prediction"][quantity] / ratio(group, name, PLAIN) - 1)
            for group in groups
            for name, arm in group["arms"].items()
            if arm.get("prediction")
        ]
        at_most(f"cost model: largest error of its {quantity}, steps and growth", 0.1, errors)
    return Table("Limits", "The worst of the measured cases.", ["what", "limit", "measured", "reached"], rows)


def markdown(results: Mapping[str, Any], plots: Sequence[Path]) -> str:
    """benchmark.md: where it was measured, the plots, the tables."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [
        "# What R-Drop costs",
        "",
        f"`{results['command']}`",
        "",
        f"{results['device']}, {results['cpu_threads']} CPU threads, {results['arguments']['dtype']}; {versions}; "
        f"{results['started']}. Medians over {results['arguments']['repeats']} interleaved repeats. Memory is the "
        "peak of what a call adds to what was there before it.",
    ]
    lines += [f"\n![{path.stem}]({path.name})" for path in plots]
    for table in tables(results):
        lines += ["", f"## {table.title}", "", table.note, "", *table_lines(table.columns, table.rows)]
    return "\n".join(lines) + "\n"


def terminal_table(table: Table) -> RichTable:
    """Make the same for a terminal of 80 columns."""
    styles = {"title_justify": "left", "caption_justify": "left", "padding": (0, 1, 0, 0)}
    made = RichTable(box=box.SIMPLE_HEAD, title=table.title, caption=table.note, **styles)
    for column in table.columns:
        made.add_column(column, no_wrap=column == "arm")
    for row in table.rows:
        made.add_row(*row)
    return made
