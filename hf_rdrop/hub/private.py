"""Copy what may be published of a run, without access tokens, folders of this machine and its name."""

import contextlib
import copy
import json
import re
import shutil
import socket
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

# Other checkpoints, what the Trainer leaves out too, and TensorBoard's logs: they carry the host in their names.
LEFT_OUT = ("_*", "checkpoint-*", "runs", "*tfevents*", "training_args.bin")
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
PROSE = (".md", ".txt", ".yaml", ".yml", ".csv", ".tsv", ".jsonl")
VOCABULARIES = ("tokenizer.json", "vocab.json", "added_tokens.json")  # any string there is data


class Private:
    """Tokens, folders and a host name that must not be published, and how to write without them.

    Args:
        tokens: access tokens; None and "" are ignored.
        folders: folders of this machine, written by their last name wherever their path occurs.
    """

    def __init__(self, tokens: Iterable[str | None], folders: Iterable[Path]) -> None:
        self._replacements = [(re.compile(re.escape(token)), "[token]") for token in tokens if token]
        paths = {path for folder in folders for path in (folder.absolute(), folder.resolve())}
        for path in sorted(paths, key=lambda path: len(path.parts), reverse=True):
            if path.name:  # the root would be every slash
                self._replacements.append((re.compile(rf"(?<![\w./-]){re.escape(str(path))}(?![\w-])"), path.name))
        self._host = re.compile(rf"(?<![^\W_]){re.escape(socket.gethostname())}(?![^\W_])")

    def clean_text(self, text: str) -> str:
        """Replace tokens and the known folders in prose."""
        for pattern, name in self._replacements:
            text = pattern.sub(lambda _, name=name: name, text)  # type: ignore[misc]
        return text

    def clean(self, value: Any) -> Any:
        """Clean a setting, or nested settings: also of every path on this machine and of its name."""
        if isinstance(value, str):
            is_path = Path(value).is_absolute() or (Path(value).name != value and _exists(value))
            return self._host.sub("host", self.clean_text(Path(value).name if is_path else value))
        if isinstance(value, Mapping):
            return {key: self.clean(inner) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(map(self.clean, value)) if type(value) in (list, tuple) else value
        return value

    def clean_args(self, args: TrainingArguments) -> TrainingArguments:
        """Copy the training arguments, cleaned and with None for access tokens."""
        cleaned = copy.copy(args)
        for name, value in vars(args).items():
            vars(cleaned)[name] = None if name.endswith("token") else self.clean(value)
        return cleaned

    def copy_folder(self, source: Path, target: Path, weights: bool = True) -> None:
        """Copy what may be published of a run's or checkpoint's folder; `weights` as hard links if possible."""
        target.mkdir(parents=True, exist_ok=True)
        for path in sorted(source.iterdir()):
            if any(fnmatch(path.name, pattern) for pattern in LEFT_OUT) or self._host.search(path.name):
                continue
            if path.is_dir():
                self.copy_folder(path, target / path.name, weights)
            elif path.suffix in WEIGHTS:
                if weights:
                    _link(path, target / path.name)
            else:
                self._copy_file(path, target / path.name)

    def _copy_file(self, source: Path, target: Path) -> None:
        settings, text = source.suffix == ".json" and source.name not in VOCABULARIES, None
        if settings or source.suffix in PROSE:
            with contextlib.suppress(UnicodeDecodeError):  # it is something else, then
                text = source.read_text("utf-8")
        cleaned = text and (self._clean_json(text) if settings else self.clean_text(text))
        if cleaned and cleaned != text:
            target.write_text(cleaned, "utf-8")
        else:
            shutil.copy2(source, target)

    def _clean_json(self, text: str) -> str:
        try:
            settings = json.loads(text)
        except ValueError:  # broken: as prose
            return self.clean_text(text)
        cleaned = self.clean(settings)
        return text if cleaned == settings else json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n"


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # too long for a name, or with a zero in it: prose
        return False


def _link(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)
