#!/usr/bin/env python
"""Try R-Drop on a tiny model of every family in Transformers' auto mappings, and write the table of what was found.

    python scripts/families.py --jobs 2
    python scripts/families.py --heads "causal LM" "masked LM" --only bert gpt2 --again

For each pair of head and family a model of random weights is trained for one step in several ways on the CPU. Checked
are, against values recomputed in float64 from the logits that the model gave: ce_loss, kl_loss at the scored
positions, loss = ce_loss + alpha / 2 * kl_loss, the loss and gradients of 4 batches of 2 rows beside one of 8, alpha 0
beside the plain Trainer, the fused head beside full logits (loss and gradients), and the first layer shared. What
R-Drop refuses with a reason of its own is "refused"; any other exception is an error.

Each pair has a child process of its own with a time limit. Killed and started again, the sweep goes on with the pairs
that are not in families.json yet; --again tries the chosen ones once more. The exit status is 1 where a value was
wrong or an error was raised.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers
from transformers.utils import logging

import hf_rdrop
from finetuning.results import read_json
from hf_rdrop.files import write_atomically as write_file
from reporting.folder import sole_user
from surveying.checks import Record, check_pair
from surveying.children import run_each
from surveying.pairs import HEADS, Pair, all_pairs
from surveying.table import write_table
from surveying.tiny_configs import tiny_config

ROOT = Path(__file__).resolve().parent.parent
FAULTS = ("wrong", "error")


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with sole_user(folder):
        file = folder / "families.json"
        survey = read_json(file) if file.exists() else {"pairs": {}}
        pairs = chosen(all_pairs(), args.only, args.heads)
        todo = [pair for pair in pairs if args.again or pair.name not in survey["pairs"]]
        print(f"{len(todo)} of {len(pairs)} pairs to try", flush=True)
        warm_up(todo)
        at = {**versions(), "commit": commit()}
        for done, (pair, record, seconds) in enumerate(sweep(todo, jobs=args.jobs, limit=args.time_limit), 1):
            record["versions"] = at
            survey["pairs"][pair.name] = record
            if record["status"] in FAULTS or args.verbose:
                print(f"{pair.name}: {record['status']} {record['reasons']} ({seconds:.1f} s)", flush=True)
            if done % 20 == 0:
                print(f"{done} of {len(todo)}", flush=True)
                write_survey(file, survey)
        known = {pair.name for pair in all_pairs()}  # what another release of Transformers had is no longer there
        survey["pairs"] = {name: record for name, record in survey["pairs"].items() if name in known}
        survey.update(at, date=f"{datetime.now(timezone.utc):%Y-%m-%d}")
        write_survey(file, survey)
        write_table(folder / "README.md", survey)
    found = [survey["pairs"][pair.name]["status"] for pair in pairs]
    print(", ".join(f"{status}: {found.count(status)}" for status in sorted(set(found))))
    return int(any(status in FAULTS for status in found))


def write_survey(file: Path, survey: dict[str, Any]) -> None:
    """Write what was found, a line for each pair, so that a change shows the pairs that it is of."""
    lines = (f"{json.dumps(name)}:{_compact(record)}" for name, record in sorted(survey["pairs"].items()))
    rest = (f"{json.dumps(name)}:{_compact(value)}," for name, value in sorted(survey.items()) if name != "pairs")
    write_file(file, "{\n" + "\n".join(rest) + '\n"pairs":{\n' + ",\n".join(lines) + "\n}}\n")


def _compact(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default=str(ROOT / "model_cards" / "families"), help="default: %(default)s")
    parser.add_argument("--only", nargs="+", help="model types, such as bert")
    parser.add_argument("--heads", nargs="+", choices=HEADS, metavar="HEAD", help=", ".join(HEADS))
    parser.add_argument("--jobs", type=int, default=1, help="child processes at a time")
    parser.add_argument("--time_limit", type=float, default=90.0, help="seconds for one pair")
    parser.add_argument("--again", action="store_true", help="try finished pairs once more")
    parser.add_argument("--verbose", action="store_true", help="print every pair, not the faults alone")
    return parser.parse_args(arguments)


def chosen(pairs: Iterable[Pair], only: Sequence[str] | None, heads: Sequence[str] | None) -> list[Pair]:
    """Keep the pairs of these families and heads; None keeps all."""
    return [p for p in pairs if (only is None or p.family in only) and (heads is None or p.head in heads)]


def warm_up(pairs: Iterable[Pair]) -> None:
    """Import what the children need: they are forked from this process."""
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    for pair in pairs:
        getattr(transformers, pair.model_class, None)
    transformers.BertModel(tiny_config("bert"))
    gc.collect()
    gc.freeze()  # a training begins with a garbage collection, which would search all that was imported


def sweep(pairs: Sequence[Pair], *, jobs: int, limit: float) -> Iterable[tuple[Pair, dict[str, Any], float]]:
    """Try each pair in a process of its own, and give what was found, as they end."""
    for pair, answer, why, seconds in run_each(pairs, lambda pair: asdict(check_pair(pair)), jobs=jobs, limit=limit):
        if answer is None:
            failed = Record(pair.head, pair.family, pair.model_class, status="error", reasons={"process": why or ""})
            answer = asdict(failed)
        yield pair, answer, seconds


def versions() -> dict[str, Any]:
    return {"transformers": transformers.__version__, "torch": torch.__version__, "hf_rdrop": hf_rdrop.__version__}


def commit() -> str | None:
    """Name the commit of this clone, with a + where the package is changed; None outside a clone."""
    asked = (["rev-parse", "--short=7", "HEAD"], ["status", "--porcelain", "hf_rdrop"])
    try:
        name, changed = (
            subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for words in asked
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return name + ("+" if changed else "")


if __name__ == "__main__":
    start = time.monotonic()
    status = main()
    print(f"{time.monotonic() - start:.0f} s")
    sys.exit(status)
