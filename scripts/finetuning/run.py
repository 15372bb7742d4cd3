"""Start a script: its arguments, its log, its output folder and the checkpoint to go on from."""

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser, TrainingArguments, set_seed

from finetuning.command_line import closest, option_name
from finetuning.renamed import check_renamed
from hf_rdrop.checkpoints import checkpoint_to_resume, last_finished
from hf_rdrop.training_args import check_removed

RESUME_OPTION = "--resume_from_checkpoint {}"


# ---- Command line ----


class _Parser(HfArgumentParser):
    def error(self, message: str) -> None:
        raise ValueError(message)  # instead of hundreds of lines of usage


def parse_arguments(classes: Sequence[type], argv: list[str] | None, description: str | None) -> list[Any]:
    """Fill the dataclasses from the command line, or from the single .json file that it names.

    Raises:
        ValueError: an argument is unknown, removed, missing, of the wrong type or out of range.
    """
    parser = _Parser(classes, description=(description or "").replace("%", "%%"), allow_abbrev=False)
    argv = sys.argv[1:] if argv is None else list(argv)
    if len(argv) == 1 and argv[0].endswith(".json"):
        argv = _json_arguments(parser, Path(argv[0]))
    *parsed, unknown = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        check_removed(map(option_name, unknown))
        known = [option for action in parser._actions for option in action.option_strings]
        if "--eval_strategy" in known:  # of TrainingArguments
            check_renamed(map(option_name, unknown), map(option_name, known))
        raise ValueError(f"unknown argument {unknown[0]}{closest(unknown[0], known)}. --help lists all arguments.")
    return parsed


def _json_arguments(parser: HfArgumentParser, file: Path) -> list[str]:
    """Turn an argument file into a command line, so that both are checked in the same way."""
    try:
        values = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"the argument file {file} cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise ValueError(f"the argument file {file} is malformed JSON ({error}).") from error
    if not isinstance(values, dict):
        raise ValueError(f'the argument file {file} must hold one JSON object such as {{"rdrop_alpha": 1.0}}.')
    actions = {action.dest: action for action in parser._actions}
    argv = []
    check_removed(values)
    for name, value in values.items():
        if name not in actions:
            if "eval_strategy" in actions:
                check_renamed([name], actions)
            raise ValueError(f"unknown argument {name!r} in {file}{closest(name, actions)}.")
        if isinstance(value, list):
            actions[name].nargs = "+"
            argv += [f"--{name}", *map(str, value)]
        elif value is not None:
            argv.append(f"--{name}={value if isinstance(value, str) else json.dumps(value)}")
    return argv


# ---- Before training: nothing here changes anything on disk ----


def start_run(args: TrainingArguments) -> str | None:
    """Set up logging and seeds, check the output folder, and return the checkpoint to resume from, if any.

    Raises:
        ValueError: there is nothing to do, the output folder is in use, or there is no such checkpoint.
    """
    logging.basicConfig(
        format="%(asctime)s - %(levelname)s - %(name)s - %(message)s", datefmt="%m/%d/%Y %H:%M:%S", level=logging.WARN
    )
    # The package's loggers and those of the scripts: all are named hf_rdrop.*.
    logging.getLogger("hf_rdrop").setLevel(logging.INFO if args.should_log else logging.ERROR)
    if args.disable_tqdm or not args.should_log:
        import datasets  # takes long, and a refused command line needs none of it

        datasets.disable_progress_bars()
    if args.enable_jit_checkpoint:
        raise ValueError(
            "--enable_jit_checkpoint is not needed: on SIGTERM the scripts save a checkpoint after the step and stop. "
            "Leave it out."
        )
    if not (args.do_train or args.do_eval or args.do_predict):
        raise ValueError("nothing to do: give at least one of --do_train, --do_eval and --do_predict.")
    set_seed(args.seed)
    return find_checkpoint(args.output_dir, args.resume_from_checkpoint, args.do_train)


def find_checkpoint(output_dir: str, resume: str | None, training: bool = True) -> str | None:
    """Find the checkpoint of `--resume_from_checkpoint`; check that a new run finds its output folder empty."""
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder} is a file: the run needs a folder. Choose another name.")
    if not training:
        return None
    if resume is None:
        if folder.is_dir() and any(folder.iterdir()):
            last = last_finished(folder)
            go_on = f"go on from {last.name} with --resume_from_checkpoint last, or " if last else ""
            raise ValueError(
                f"--output_dir {folder} is not empty, and a new run would mix its files with those there. Nothing was "
                f"changed. To train, {go_on}choose another folder (or empty this one yourself)."
            )
        return None
    wanted = True if resume.lower() in ("true", "last") else resume
    return checkpoint_to_resume(wanted, folder, RESUME_OPTION)
