"""Images of the command line for the README, made of real runs: python docs/terminal.py writes docs/images/*.svg.

Commands run in a pseudo-terminal on the photographs that come with scikit-image; what they draw meanwhile is replayed.
Colors are those of a dark terminal, on a background of their own; fonts are those of whoever looks.
"""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import shutil
import struct
import sys
import tempfile
import termios
import time
from pathlib import Path
from typing import NamedTuple

import skimage
from rich.console import Console
from rich.text import Text

from alit.demo import PHOTOGRAPHS

IMAGES = Path(__file__).parent / "images"
#: Each image: commands one after another, and the columns of its terminal.
SCENES = {
    "help": (["alit --help"], 88),
    "encode": (["alit encode photos -o photos.alit", "alit info photos.alit"], 88),
    "evaluate": (["alit evaluate nano --data photos"], 124),
}
#: Frames of a replay at most, its seconds at most, and those for which the end stays.
FRAMES, SECONDS, STAYS = 12, 4.0, 12.0
#: A command as its entry point runs it, whatever is installed.
ENTRY = "import sys; sys.argv[0] = 'alit'; from alit.cli import app; app()"
FONTS = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
FRAME = """<style>
.{unique_id}-matrix {{ font: {char_height}px/{line_height}px FONTS; white-space: pre }}
{styles}
</style>
<defs>{lines}</defs>
<g class="{unique_id}-frame">{backgrounds}<g class="{unique_id}-matrix">{matrix}</g></g>"""
PARTS = "{width}\0{height}\0{terminal_x}\0{terminal_y}\0{chrome}"


class Shot(NamedTuple):
    """What stood on the screen from a time on: lines with their escapes. ``end``: the command is done."""

    seconds: float
    lines: list[str]
    end: bool = False


class Screen:
    """As much of a terminal as rich's lines and bars need: whole lines are cleared and written anew."""

    def __init__(self, lines: list[str]) -> None:
        self.lines, self.row = [*lines, ""], len(lines)

    def feed(self, text: str) -> None:
        for part in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+|\x1b", text):
            if part == "\n":
                self.row += 1
                self.lines += [""] * (self.row + 1 - len(self.lines))
            elif re.fullmatch(r"\x1b\[\d*A", part):
                self.row -= int(part[2:-1] or 1)
            elif part == "\x1b[2K":
                self.lines[self.row] = ""
            elif part.endswith("m") or not part.startswith(("\x1b", "\r")):
                self.lines[self.row] += part


def played(commands: list[str], columns: int, folder: Path) -> list[Shot]:
    """Run the commands, and keep what the terminal showed at each change."""
    shots: list[Shot] = []
    start, shown = time.monotonic(), list[str]()
    for command in commands:
        screen = Screen([*shown, f"\x1b[1;32m$\x1b[0m \x1b[1m{command}\x1b[0m"])
        shots.append(Shot(time.monotonic() - start, screen.lines[:]))
        child, terminal = pty.fork()
        if child == 0:
            os.chdir(folder)
            os.environ.update(TERM="xterm-256color", COLUMNS=str(columns), LINES="50")
            os.execv(sys.executable, [sys.executable, "-c", ENTRY, *command.split()[1:]])
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
        rest = b""
        while data := _read(terminal):
            text, rest = _decoded(rest + data)
            screen.feed(text)
            shots.append(Shot(time.monotonic() - start, screen.lines[:]))
        _, status = os.waitpid(child, 0)
        if status:
            raise SystemExit("\n".join(screen.lines))
        shots.append(Shot(time.monotonic() - start, screen.lines[:], end=True))
        shown = [*screen.lines[: screen.row], ""]
    return shots


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # as Linux says that nobody writes any more
        return b""


def _decoded(data: bytes) -> tuple[str, bytes]:
    """Whole characters and escapes, and what may go on."""
    cut = max(data.rfind(b"\x1b"), len(data) - 3)
    for end in (len(data), *range(len(data) - 1, cut - 1, -1)):
        try:
            text = data[:end].decode()
        except UnicodeDecodeError:
            continue
        if not re.search(r"\x1b(\[[?\d;]*)?$", text):
            return text, data[end:]
    return data[:cut].decode(errors="replace"), data[cut:]


def chosen(shots: list[Shot]) -> list[Shot]:
    """The end of each command, and some with a bar, evenly over the time."""
    bars = [
        shot for shot in shots if any("\u2501" in line and "left" in line for line in shot.lines)
    ]
    every = max(1, -(-len(bars) // FRAMES))
    return sorted([*bars[::every], *(shot for shot in shots if shot.end)])


def svg(shots: list[Shot], columns: int, title: str) -> str:
    """The last shot; where CSS animations run, the others before it."""
    last = len(shots) - 1
    begin, end = shots[0].seconds, shots[-1].seconds
    speed = min(1.0, SECONDS / max(end - begin, 1e-9))
    times = [(shot.seconds - begin) * speed for shot in shots]
    whole = times[-1] + STAYS
    frames, rules = [], [f".{x}-frame {{ opacity: 0 }}" for x in (f"f{n}" for n in range(last))]
    for number, shot in enumerate(shots):
        frames.append(
            _recorded(shot, columns).export_svg(code_format=FRAME, unique_id=f"f{number}")
        )
        if last:
            on = 100 * times[number] / whole
            off = 100 * times[number + 1] / whole if number < last else 100.0
            steps = f"{on:.2f}% {{ opacity: 1 }} {off:.2f}% {{ opacity: {int(number == last)} }}"
            before = "0% { opacity: 0 } " if number else ""
            rules.append(
                f"@keyframes k{number} {{ {before}{steps} 100% {{ opacity: {int(number == last)} }} }}"
            )
            rules.append(
                f".f{number}-frame {{ animation: k{number} {whole:.2f}s step-end infinite }}"
            )
    still = "@media (prefers-reduced-motion: reduce) { g { animation: none !important } }"
    parts = _recorded(shots[-1], columns).export_svg(title=title, code_format=PARTS, unique_id="t")
    width, height, x, y, chrome = parts.split("\0")
    style = "\n".join([".t-title { font: bold 18px sans-serif }", *rules, still])
    body = "\n".join(frames).replace("FONTS", FONTS)
    return (
        f'<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg" role="img">\n<title>{title}</title>\n'
        f'<style>\n{style}\n</style>\n{chrome}\n<g transform="translate({x}, {y})">\n{body}\n</g>\n</svg>\n'
    )


def _recorded(shot: Shot, columns: int) -> Console:
    console = Console(record=True, width=columns, file=io.StringIO(), color_system="256")
    lines = [line.rstrip() for line in shot.lines]
    while lines and not Text.from_ansi(lines[-1]).plain.strip():
        lines.pop()
    for line in lines:
        text = Text.from_ansi(line)
        for part in text.divide(range(columns, len(text), columns)):
            console.print(part, no_wrap=True)
    return console


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        photos = Path(scratch, "photos")
        photos.mkdir()
        for file in PHOTOGRAPHS.values():
            shutil.copy(Path(skimage.__file__).parent / "data" / file, photos)
        for name in sys.argv[1:] or SCENES:
            commands, columns = SCENES[name]
            shots = chosen(played(commands, columns, Path(scratch)))
            made = svg(shots, columns, commands[0].split(" -")[0] if len(commands) == 1 else "alit")
            (IMAGES / f"{name}.svg").write_text(made, encoding="utf-8")
            print(
                f"docs/images/{name}.svg: {len(made.encode()) / 1000:.0f} kB, {len(shots)} frames"
            )


if __name__ == "__main__":
    main()
