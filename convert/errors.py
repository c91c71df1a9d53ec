"""What a user is told when a conversion cannot go on: one line that names the file or field and what to do."""

from __future__ import annotations

from pathlib import Path


class ConvertError(Exception):
    """A conversion failed; exit status 1."""

    exit_status = 1


class CannotStartError(ConvertError):
    """Nothing was tried: no checkpoint, no network, an unsupported architecture, bad usage; exit status 2."""

    exit_status = 2


def check_names(*paths: Path | None) -> None:
    """llama.cpp and a file's metadata take UTF-8 alone. Raises CannotStartError naming the path."""
    for path in paths:
        if path is not None and any("\ud800" <= character <= "\udfff" for character in str(path.absolute())):
            shown = str(path).encode("utf-8", "backslashreplace").decode()
            raise CannotStartError(f"{shown}: not a name in UTF-8: rename it")
