"""Display of a command's progress on stderr."""

from __future__ import annotations

import math
import sys
import time
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

#: Seconds between lines if stderr is no terminal, redraws a second if it is one, seconds over which speed is averaged.
EVERY, REDRAWS, AVERAGED = 30.0, 5, 3600.0
#: Longest remaining time that is shown, in seconds.
LONGEST = 1e9


class Display:
    """Progress of a command on stderr: a bar if that is a terminal, else a line every ``EVERY`` seconds."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self.drawn = sys.stderr.isatty() and not console.is_dumb_terminal
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=16),
            _Numbers(table_column=Column(no_wrap=True, overflow="ellipsis")),
            console=console,
            transient=True,
            refresh_per_second=REDRAWS,
            speed_estimate_period=AVERAGED,
            get_time=time.monotonic,
            redirect_stdout=False,  # a document may go there, to a file
            disable=not self.drawn,
        )
        self._task: TaskID | None = None
        self._said = time.monotonic()

    def report(self, what: str, done: float, total: float | None, unit: str, tell: str) -> None:
        """Update the bar, or print a line; arguments as for :func:`alit.console.report`."""
        task = self.task
        if task is None or task.description != what or done < task.completed:
            self._forget()
            self._task = self._bar.add_task(what, total=None, unit=unit, tell=tell, begun=done)
            self._bar.update(self._task, completed=done, total=total)
            self._bar.start()
        else:
            self._bar.update(task.id, completed=done, total=total, tell=tell)
        if not self.drawn and time.monotonic() - self._said >= EVERY:
            self._said = time.monotonic()
            task = self._bar.tasks[0]
            print(f"{task.description}: {_told(task)}", file=sys.stderr, flush=True)

    @property
    def task(self) -> Task | None:
        """Current task of the bar; None if there is none."""
        return None if self._task is None else self._bar.tasks[0]

    def place(self) -> str:
        """Text of the current task and how much of it is done; empty if there is none."""
        task = self.task
        if task is None:
            return ""
        return (
            f"{task.description}, {_counts(task)}" if task.total is not None else task.description
        )

    def clear(self) -> bool:
        """Stop drawing until more is reported; True if something was drawn."""
        seen = self.drawn and self.task is not None
        self._bar.stop()
        self._forget()
        return seen

    def _forget(self) -> None:
        if self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None


class _Numbers(ProgressColumn):
    """Column beside the bar: amount, speed and time."""

    def render(self, task: Task) -> Text:
        return Text(_told(task))


def _counts(task: Task) -> str:
    """Text of the amount done: items of the total, or a percentage."""
    unit, total = task.fields["unit"], task.total or 0
    return f"{task.completed:.0f}/{total:.0f} {unit}" if unit else f"{task.percentage:.0f} %"


def _speed(task: Task) -> float:
    """Items per second: after the first items, which take longer to prepare; until there are more, since the start."""
    elapsed = task.elapsed or 0
    return task.speed or ((task.completed - task.fields["begun"]) / elapsed if elapsed > 0 else 0.0)


def _told(task: Task) -> str:
    """Text of the amount done, the speed, and the time left or else elapsed."""
    unit, speed, told = task.fields["unit"], _speed(task), list[str]()
    if task.total is not None:
        told.append(_counts(task))
        if unit and speed:
            told.append(f"{speed:.0f} {unit}/s" if speed >= 10 else f"{speed:.2g} {unit}/s")
    if task.total is not None and speed and not task.finished:
        left = min((task.total - task.completed) / speed, LONGEST)
        told.append(f"{timedelta(seconds=math.ceil(left))} left")
    else:
        told.append(f"{timedelta(seconds=int(task.elapsed or 0))}")
    return ", ".join([*told, *([task.fields["tell"]] if task.fields["tell"] else [])])
