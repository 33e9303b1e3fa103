"""How far a long command is, on stderr."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from sparseland.cli.output import console


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str, float], None]]:
    """A bar with the time left on a terminal, a line per step elsewhere; always on stderr."""
    screen = console(stderr=True)
    if not screen.is_terminal:
        told: list[str] = []

        def line(message: str, done: float) -> None:
            told.append(f"{100 * done:3.0f} %  {message}")
            # The first line waits for the second: a model that can't be loaded is one line of error.
            if len(told) > 1:
                screen.print("\n".join(told if len(told) == 2 else told[-1:]), soft_wrap=True)

        yield line
        return
    columns = (
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )
    # Steps take seconds to minutes, so the speed is judged over minutes.
    with Progress(*columns, console=screen, transient=True, speed_estimate_period=300) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda message, done: bar.update(task, completed=done, description=message)
