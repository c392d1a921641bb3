"""Messages and progress of a run. Silent by default; the CLI passes `TerminalLog`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")
Advance = Callable[..., None]


class Log:
    """Collects warnings and shows nothing."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def info(self, message: str) -> None:
        """Say what is being done."""

    def warn(self, message: str) -> None:
        """Say what the user should know; repeated messages count once."""
        if message not in self.warnings:
            self.warnings.append(message)

    @contextmanager
    def progress(self, description: str, total: int | None) -> Iterator[Advance]:
        """Give a function `advance(steps=1, note="")` for something that has `total` steps."""

        def advance(steps: int = 1, note: str = "") -> None:
            return None

        yield advance

    def track(self, items: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
        """Yield `items` and show how far it is."""
        size = total if total is not None else (len(items) if hasattr(items, "__len__") else None)  # type: ignore[arg-type]
        with self.progress(description, size) as advance:
            for item in items:
                yield item
                advance()


class TerminalLog(Log):
    """Writes to stderr with rich: messages, and bars with an ETA for what takes over a second."""

    def __init__(self, quiet: bool = False):
        super().__init__()
        from rich.console import Console

        self.console = Console(stderr=True)
        self.quiet = quiet

    def info(self, message: str) -> None:
        """Print one dim line."""
        if not self.quiet:
            self.console.print(message, style="dim", highlight=False, markup=False)

    def warn(self, message: str) -> None:
        """Print a warning the first time."""
        if message not in self.warnings:
            self.console.print(f"warning: {message}", style="yellow", highlight=False, markup=False, soft_wrap=True)
        super().warn(message)

    @contextmanager
    def progress(self, description: str, total: int | None) -> Iterator[Advance]:
        """Show a bar once a second has passed; it disappears when done."""
        if self.quiet or not self.console.is_terminal:
            with super().progress(description, total) as silent:
                yield silent
            return
        import time

        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[note]}"), console=self.console, transient=True,
        )  # fmt: skip
        task = bar.add_task(description, total=total, note="")
        shown_from = time.monotonic() + 1.0

        def advance(steps: int = 1, note: str = "") -> None:
            if not bar.live.is_started and time.monotonic() > shown_from:
                bar.start()
            bar.update(task, advance=steps, note=note)

        try:
            yield advance
        finally:
            bar.stop()
