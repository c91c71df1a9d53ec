"""What a user is told when a conversion cannot go on: one line that names the file or field and what to do."""

from __future__ import annotations


class ConvertError(Exception):
    """A conversion failed; exit status 1."""

    exit_status = 1


class CannotStartError(ConvertError):
    """Nothing was tried: no checkpoint, no network, an unsupported architecture, bad usage; exit status 2."""

    exit_status = 2
