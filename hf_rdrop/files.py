"""Write files that are either whole or not there."""

import os
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: Path, content: str | bytes | Callable[[Path], None]) -> None:
    """Write a file at once: whoever reads it, or kills this process, finds the old content or the new one.

    `content` may be a function that writes the file to the path it is given.
    """
    part = path.with_name(f".{path.name}.part")
    if callable(content):
        content(part)
    else:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(part, path)
