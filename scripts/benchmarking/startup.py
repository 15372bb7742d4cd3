"""Measure start-up: processor seconds of short commands in two checkouts, interleaved; prints a table of ratios.

    python scripts/benchmarking/startup.py --before ../a01bfe2 --repeats 5

Each command runs in a process of its own, first in the earlier checkout, then in this one, and again. The smallest
of the repeats counts, since other processes can only add to it. Commands with a reference are compared with that
import too.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parents[2]
ARGUMENTS_FLOOR = "from transformers import HfArgumentParser, Seq2SeqTrainingArguments"
# A command line, or a program; what a program is compared with, None for the same command in the earlier checkout.
COMMANDS: dict[str, tuple[list[str] | str, str | None]] = {
    "compare.py --help": (["compare.py", "--help"], None),
    "compare.py --demo --dry_run": (["compare.py", "--demo", "--dry_run"], None),
    "compare.py --demo --jobs 0": (["compare.py", "--demo", "--jobs", "0"], None),
    "sweep.py --help": (["sweep.py", "--help"], None),
    "sweep.py --trials 3": (["sweep.py", "--trials", "3"], None),
    "reference_cards.py --help": (["reference_cards.py", "--help"], None),
    "run_glue.py --help": (["run_glue.py", "--help"], ARGUMENTS_FLOOR),
    "run_glue.py --sede 1": (["run_glue.py", "--sede", "1"], ARGUMENTS_FLOOR),
    "run_translation.py --help": (["run_translation.py", "--help"], ARGUMENTS_FLOOR),
    "import hf_rdrop": ("import hf_rdrop", None),
    "RDropTrainer": ("from hf_rdrop import RDropTrainer", "from transformers import Trainer"),
}


def seconds(command: list[str] | str, checkout: Path) -> float:
    """Processor seconds, of user and system, of one process."""
    program = isinstance(command, str)
    words = ["-c", command] if program else [str(checkout / "scripts" / command[0]), *command[1:]]
    path = os.pathsep.join(filter(None, [str(checkout), os.environ.get("PYTHONPATH", "")]))
    env = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, *words], cwd=folder, env=env, capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="the earlier checkout")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="", help="commands that contain this text")
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    print("| command | before, s | now, s | now / before | reference, s | now / reference |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, (command, reference) in COMMANDS.items():
        if args.only not in name:
            continue
        kinds = [(command, args.before.resolve()), (command, HERE), *([(reference, HERE)] if reference else [])]
        taken = [[seconds(*kind) for kind in kinds] for _ in range(args.repeats)]
        before, now, *floor = map(min, zip(*taken, strict=True))
        figures = [before, now, now / before, *floor, *(now / value for value in floor)]
        cells = [f"{figure:.2f}" for figure in figures] + [""] * (5 - len(figures))
        print(f"| `{name}` | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
