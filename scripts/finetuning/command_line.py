"""Command lines without Transformers: names of arguments, likely ones for a misspelt one, and how a script ends."""

import difflib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

STATUS = 128 + signal.SIGTERM  # as in hf_rdrop.sigterm, which needs Transformers


def option_name(argument: str) -> str:
    """Return the name in `--name` or `--name=value`, with _ in place of -; empty for what is no option."""
    return argument.partition("=")[0][2:].replace("-", "_") if argument.startswith("--") else ""


def option_names(arguments: Sequence[str]) -> set[str]:
    """Return the names of the options among the arguments."""
    return {option_name(argument) for argument in arguments} - {""}


def without_folders(argument: str) -> str:
    """Show an argument to others: what lies on this machine by its last name only."""
    name, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return f"{name}{equals}{Path(value).name if value and Path(value).exists() else value}"


def closest(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)`, or nothing when no known name is near."""
    if len(str(name)) > 100:  # no name, and comparing it would take long
        return ""
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


def cli(main: Callable[[], Any]) -> None:
    """Run a script: an error of the user's ends it with one message and status 2, without a traceback."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(STATUS))  # not at once: temporary folders and locks go first
    try:
        main()
        torch = sys.modules.get("torch")
        if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
            # Left to the end of the interpreter, its threads may abort a process that has finished its work.
            torch.distributed.destroy_process_group()
    except (ValueError, OSError) as error:
        if os.environ.get("HF_RDROP_DEBUG", "0") not in ("", "0"):
            traceback.print_exc()
        rank = os.environ.get("RANK", "0")
        print(f"error{'' if rank == '0' else f' (rank {rank})'}: {error}", file=sys.stderr)
        sys.exit(2)
