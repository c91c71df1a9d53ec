"""A progress bar on standard error; silent where that is no terminal, and after a while of nothing to tell."""

from __future__ import annotations

from types import TracebackType

from tqdm import tqdm


class Progress:
    """`with Progress("writing F16", total) as done: done(n)`; unit B: bytes."""

    def __init__(self, what: str, total: int, unit: str = "B") -> None:
        self._bar = tqdm(
            total=total, desc=what, unit=unit, unit_scale=unit == "B", unit_divisor=1000, disable=None, leave=False
        )

    def __enter__(self) -> Progress:
        return self

    def __call__(self, n: int) -> None:
        self._bar.update(n)

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
