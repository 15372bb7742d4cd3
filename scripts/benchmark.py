#!/usr/bin/env python
"""Measure what R-Drop costs and what its economies save: time and memory as ratios, each within one run.

    python scripts/benchmark.py --output_dir outputs/benchmark
    python scripts/benchmark.py --sections steps --heads translation --repeats 9 --output_dir outputs/translation

loss:   from hidden states to R-Drop's loss and its gradients: the official formula on full logits, the closed form on
        full logits, and the fused head, over a grid of rows and vocabularies.
steps:  one training step of each head through the real Trainer: plain with B and with 2B rows, two forwards as R-Drop
        is written by hand, and RDropTrainer without and with each of its economies.
growth: how these grow with vocabulary, sequence length, batch and depth, one at a time.
precision: errors of the agreement's value and gradient for logits in half precision, as the passes come to agree.

The arms take turns within every repeat; figures are medians over the repeats. Memory is the peak of what a call adds
to what was there before it (in a step: activations, gradients and temporaries), measured in a call of its own. The
folder gets benchmark.json (every sample), benchmark.md (the tables) and the plots, after each section; Ctrl-C keeps
what was measured until then.
"""

import gc
import itertools
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

# The profiler writes to the terminal at each use, through the progress bar, unless this is set before torch is there.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import psutil
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarking.loss import FUSED as FUSED_LOSS
from benchmarking.loss import OFFICIAL_COPIES, TOLERANCES, loss_arms, loss_differences
from benchmarking.measure import Arm, copy_bandwidth, elementwise_seconds, environment, measure
from benchmarking.plots import plot
from benchmarking.precision import CLASSES, DTYPES, TARGETS, precision_errors
from benchmarking.report import markdown, tables, terminal_table
from benchmarking.steps import FUSED, HEADS, PLAIN, RDROP, TRUNK_3_4, Sizes, step_arms, step_settings
from finetuning.command_line import cli
from finetuning.results import write_file
from finetuning.run import parse_arguments
from hf_rdrop.alpha import check_alpha

SECTIONS = ("loss", "steps", "growth", "precision")
GROWTH_HEADS = {"vocab": "translation", **dict.fromkeys(("length", "batch", "layers"), "sequence-classification")}
GROWTH_ARMS = (PLAIN, RDROP, FUSED, TRUNK_3_4)
# On a GPU sizes that keep it busy; on a CPU such that a whole run takes about a quarter of an hour on two cores.
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {
        **{"num_layers": 12, "hidden_size": 256, "batch_size": 8, "sequence_length": 64, "vocab_size": 32000},
        **{"loss_rows": [512, 2048], "loss_vocab": [2, 100, 1000, 32000, 128000], "loss_width": 256},
        **{"growth_vocab": [8000, 32000, 64000], "growth_length": [32, 64, 128]},
        **{"growth_batch": [4, 8, 16], "growth_layers": [4, 8, 12]},
    },
    "cuda": {
        **{"num_layers": 12, "hidden_size": 768, "batch_size": 32, "sequence_length": 128, "vocab_size": 32000},
        **{"loss_rows": [2048, 16384], "loss_vocab": [2, 100, 1000, 32000, 128000, 256000], "loss_width": 2048},
        **{"growth_vocab": [32000, 64000, 128000], "growth_length": [64, 128, 256, 512]},
        **{"growth_batch": [16, 32, 64, 128], "growth_layers": [6, 12, 24]},
    },
}
# A trunk needs a layer above it, in each half of an encoder-decoder too, and a vocabulary its special tokens.
LEAST = {"num_layers": 4, "growth_layers": 4, "vocab_size": 4, "growth_vocab": 4, "loss_vocab": 2} | {
    **{"hidden_size": 2, "sequence_length": 2, "growth_length": 2}
}


def _help(text: str) -> dict[str, str]:
    return {"help": f"{text} Default: by device."}


@dataclass
class BenchmarkArguments:
    """Parts of the benchmark to measure, and the device."""

    output_dir: str = field(default="outputs/benchmark", metadata={"help": "Folder for tables, samples and plots."})
    overwrite: bool = field(default=False, metadata={"help": "Replace the benchmark that --output_dir holds."})
    sections: list[str] = field(default_factory=lambda: list(SECTIONS), metadata={"help": ", ".join(SECTIONS) + "."})
    heads: list[str] = field(
        default_factory=lambda: list(HEADS), metadata={"help": f"Heads of the section steps: {', '.join(HEADS)}."}
    )
    device: Literal["auto", "cpu", "cuda"] = field(default="auto", metadata={"help": "auto: cuda if there is one."})
    dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "bfloat16: hidden states and head (loss), autocast (steps, growth)."}
    )
    repeats: int = field(default=5, metadata={"help": "Samples of each arm; an odd number has a median of its own."})
    rdrop_alpha: float = field(default=1.0, metadata={"help": "Weight of the agreement; costs do not depend on it."})
    seed: int = field(default=0, metadata={"help": "Seed of weights and data."})
    num_layers: int | None = field(default=None, metadata=_help("Layers L; an encoder-decoder has half in each part."))
    hidden_size: int | None = field(default=None, metadata=_help("Width of the models; attention heads have 64."))
    batch_size: int | None = field(default=None, metadata=_help("Rows B of the plain batch."))
    sequence_length: int | None = field(default=None, metadata=_help("Tokens of a row."))
    vocab_size: int | None = field(default=None, metadata=_help("Vocabulary of the models."))
    loss_rows: list[int] | None = field(default=None, metadata=_help("loss: items N, each with two hidden states."))
    loss_vocab: list[int] | None = field(default=None, metadata=_help("loss: vocabularies V."))
    loss_width: int | None = field(default=None, metadata=_help("loss: width D of the hidden states."))
    growth_vocab: list[int] | None = field(default=None, metadata=_help("growth: vocabularies (translation)."))
    growth_length: list[int] | None = field(default=None, metadata=_help("growth: tokens of a row (classification)."))
    growth_batch: list[int] | None = field(default=None, metadata=_help("growth: rows (classification)."))
    growth_layers: list[int] | None = field(default=None, metadata=_help("growth: layers (classification)."))

    def sizes(self) -> Sizes:
        return Sizes(self.num_layers, self.hidden_size, self.batch_size, self.sequence_length, self.vocab_size)


@dataclass
class Group:
    """Arms that are measured beside each other."""

    name: str
    facts: dict[str, Any]
    arms: int
    make: Callable[[], Iterable[Arm]]


def parse(argv: Sequence[str] | None) -> tuple[BenchmarkArguments, torch.device]:
    """Arguments with the device's defaults filled in.

    Raises:
        ValueError: an argument is impossible; nothing has been measured or written.
    """
    args: BenchmarkArguments
    (args,) = parse_arguments([BenchmarkArguments], None if argv is None else list(argv), __doc__.splitlines()[0])
    cuda = torch.cuda.is_available()
    if args.device == "cuda" and not cuda:
        raise ValueError("--device cuda: PyTorch finds no GPU here. Use --device cpu.")
    device = torch.device("cuda" if cuda and args.device != "cpu" else "cpu")
    if device.type == "cuda" and torch.cuda.device_count() > 1:
        raise ValueError("the benchmark measures one GPU: show it one, e.g. with CUDA_VISIBLE_DEVICES=0.")
    for name, choices in (("sections", SECTIONS), ("heads", HEADS)):
        chosen = getattr(args, name)
        if not chosen or set(chosen) - set(choices) or len(set(chosen)) < len(chosen):
            raise ValueError(f"--{name} takes one or more of {', '.join(choices)}, each once; got {' '.join(chosen)}.")
    check_alpha(args.rdrop_alpha)
    if args.rdrop_alpha == 0 or args.repeats < 1:
        raise ValueError("--rdrop_alpha must be above 0 (0 is plain training), and --repeats at least 1.")
    for name, default in DEFAULTS[device.type].items():
        value = getattr(args, name) if getattr(args, name) is not None else default
        setattr(args, name, value)
        least = LEAST.get(name, 1)
        if any(number < least for number in (value if isinstance(value, list) else [value])):
            raise ValueError(f"--{name} must be at least {least}, got {value}.")
        if isinstance(value, list) and (not value or len(set(value)) < len(value)):
            raise ValueError(f"--{name} takes one or more different numbers, got {value}.")
    if args.num_layers % 2:
        raise ValueError(f"--num_layers must be even (half are an encoder-decoder's decoder), got {args.num_layers}.")
    if args.hidden_size % (64 if args.hidden_size > 64 else 2):
        raise ValueError(f"--hidden_size must be even, and a multiple of 64 above 64, got {args.hidden_size}.")
    folder = Path(args.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder} is a file: choose another name.")
    if (folder / "benchmark.json").exists() and not args.overwrite:
        raise ValueError(f"--output_dir {folder} holds a benchmark: choose another folder, or give --overwrite.")
    return args, device


# ---- What is measured ----


def plan(args: BenchmarkArguments, device: torch.device, folder: str) -> dict[str, list[Group]]:
    """The groups of every section."""
    dtype = getattr(torch, args.dtype)
    common = {"alpha": args.rdrop_alpha, "device": device, "dtype": dtype, "seed": args.seed}

    def loss_group(rows: int, vocab: int) -> Group:
        facts = {"rows": rows, "vocab": vocab, "width": args.loss_width}
        return Group(f"{rows} x {vocab}", facts, 3, lambda: loss_arms(rows, vocab, args.loss_width, **common))

    def step_group(name: str, facts: dict[str, Any], sizes: Sizes, wanted: Sequence[str] | None = None) -> Group:
        head = facts["head"]
        arms = [arm for arm in step_settings(head, sizes.layers) if wanted is None or arm in wanted]
        make = partial(step_arms, head, sizes, arms, folder=folder, **common)
        return Group(name, {**facts, "sizes": asdict(sizes)}, len(arms), make)

    def growth_group(axis: str, value: int) -> Group:
        facts = {"axis": axis, "value": value, "head": GROWTH_HEADS[axis]}
        return step_group(f"{axis} {value}", facts, replace(args.sizes(), **{axis: value}), GROWTH_ARMS)

    def precision_group(dtype: str, classes: int, target: float) -> Group:
        facts = {"dtype": dtype, "classes": classes, "target": target}
        return Group(f"{dtype}, {classes} classes, KL {target:g}", facts, 0, tuple)

    sections = {
        "loss": [loss_group(rows, vocab) for rows in args.loss_rows for vocab in args.loss_vocab],
        "steps": [step_group(head, {"head": head}, args.sizes()) for head in args.heads],
        "growth": [growth_group(axis, value) for axis in GROWTH_HEADS for value in getattr(args, f"growth_{axis}")],
        "precision": [precision_group(*case) for case in itertools.product(DTYPES, CLASSES, TARGETS)],
    }
    return {name: sections[name] for name in SECTIONS if name in args.sections}


def free_bytes(device: torch.device) -> int:
    return psutil.virtual_memory().available if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]


def measure_group(group: Group, section: str, args: BenchmarkArguments, device: torch.device, advance: Any) -> dict:
    """Everything about one group, as it goes into benchmark.json."""
    facts = {"section": section, **group.facts}
    if section == "precision":
        return {**facts, "arms": {}, "errors": precision_errors(**group.facts, seed=args.seed)}
    if section == "loss":
        needed = OFFICIAL_COPIES * 2 * facts["rows"] * facts["vocab"] * 4
        free = free_bytes(device)
        if needed > 0.9 * free:
            reason = f"the official formula needs about {needed / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free"
            return {**facts, "left_out": reason, "arms": {}}
    arms = list(group.make())
    if section == "loss":
        facts["differences"] = loss_differences(arms)
        tolerance = TOLERANCES[args.dtype]
        if not max(facts["differences"].values()) <= tolerance:  # also a nan
            raise ValueError(
                f"the arms of the loss stage differ by more than {tolerance:g} at {group.name}: "
                f"{facts['differences']}. Their times would be those of different things."
            )
    facts["arms"] = measure(arms, args.repeats, device, advance)
    if section == "loss" and (facts["rows"], facts["vocab"]) == (max(args.loss_rows), max(args.loss_vocab)):
        fused = next(arm for arm in arms if arm.name == FUSED_LOSS)
        taken = elementwise_seconds(fused.run, device)
        # At the least each logit is read once and its gradient written once.
        moved = 2 * 2 * facts["rows"] * facts["vocab"] * getattr(torch, args.dtype).itemsize
        facts["bandwidth"] = {"elementwise": moved / taken, "copy": copy_bandwidth(device)}
    return facts


# ---- Running it ----


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure and report; returns what benchmark.json holds."""
    args, device = parse(argv)
    gc.freeze()  # what the imports have left need not be searched again before every measurement
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    console = Console()
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "command": shlex.join(["python", "scripts/benchmark.py", *(sys.argv[1:] if argv is None else argv)]),
        "arguments": {**asdict(args), "output_dir": folder.name},
        **environment(device),
        "groups": [],
    }

    def save() -> None:
        write_file(folder / "benchmark.json", json.dumps(results, indent=1) + "\n")  # the arms keep their order

    def report() -> None:
        save()
        plots = plot(results["groups"], folder)
        write_file(folder / "benchmark.md", markdown(results, plots))

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("left"))
    with (
        tempfile.TemporaryDirectory(prefix="hf_rdrop-benchmark-") as scratch,
        Progress(*columns, TimeRemainingColumn(), console=console) as progress,
    ):
        sections = plan(args, device, scratch)
        total = sum(group.arms * (args.repeats + 1) for groups in sections.values() for group in groups)
        bar = progress.add_task("", total=total)
        done = 0
        try:
            for section, groups in sections.items():
                for group in groups:
                    what = f"{section}, {group.name}"

                    def advance(arm: str, what: str = what) -> None:
                        progress.update(bar, description=f"{what}: {arm}", advance=1)

                    try:
                        facts = measure_group(group, section, args, device, advance)
                    except torch.cuda.OutOfMemoryError as error:
                        facts = {"section": section, **group.facts, "left_out": str(error).split(".")[0], "arms": {}}
                    results["groups"].append(facts)
                    save()
                    done += group.arms * (args.repeats + 1)
                    progress.update(bar, completed=done)
                    gc.collect()
                    if device.type == "cuda":
                        torch.cuda.empty_cache()
                report()
        except KeyboardInterrupt:
            report()
            progress.stop()
            console.print(f"Stopped; what was measured until then is in {folder}.", highlight=False)
            sys.exit(130)
    for table in tables(results):
        console.print(terminal_table(table))
    console.print(f"Written to {folder}: {', '.join(sorted(p.name for p in folder.glob('*.*')))}", highlight=False)
    return results


if __name__ == "__main__":
    cli(main)
