"""Progress of long work: a bar with an ETA on a terminal, a plain line now and then elsewhere."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Advance = Callable[..., None]
SPEAKS = os.environ.get("RANK", "0") == "0"  # of several processes, the first
_LINE_EVERY = 30.0  # seconds

console = Console(stderr=True, highlight=False, quiet=not SPEAKS)


def unheard(steps: int = 1, note: str = "") -> None:
    """Progress that nobody follows."""


def say(line: str) -> None:
    """One line for the user, on stderr: results go to stdout and files."""
    console.print(line, markup=False, soft_wrap=True)


def tell(line: str) -> None:
    """The same from any process: a trouble of one of several is none of the first's."""
    Console(stderr=True, highlight=False).print(
        line if SPEAKS else f"rank {os.environ['RANK']}: {line}", markup=False, soft_wrap=True
    )


@contextmanager
def progress(what: str, total: int, done: int = 0) -> Iterator[Advance]:
    """Yields `advance(steps=1, note="")`.

    Args:
        done: steps done before, by an earlier run.
    """
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
        )  # fmt: skip
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(what, total=total, completed=done, note="")

            def advance(steps: int = 1, note: str = "") -> None:
                fields: dict[str, Any] = {"note": note} if note else {}
                bar.update(task, advance=steps, **fields)

            yield advance
    else:
        yield _plain(what, total, done)


def _plain(what: str, total: int, done: int) -> Advance:
    started = spoken = time.monotonic()
    first, last_note = done, ""

    def advance(steps: int = 1, note: str = "") -> None:
        nonlocal done, spoken, last_note
        done, last_note = done + steps, note or last_note
        now = time.monotonic()
        if done >= total or now - spoken >= _LINE_EVERY:
            spoken = now
            rate = (done - first) / max(now - started, 1e-9)
            left = f", {_duration((total - done) / rate)} left" if rate > 0 and done < total else ""
            say(f"{what}: {done}/{total}, {_duration(now - started)}{left}{'  ' + last_note if last_note else ''}")
            sys.stderr.flush()

    return advance


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
