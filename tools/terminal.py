"""Draw what a command printed as a picture of a terminal, for the README.

    make run 2>&1 | tee run.log
    python tools/terminal.py run.log images/run_terminal.svg

Of a progress bar a few states are shown. The picture is an SVG without fonts of its
own: a browser takes the reader's.
"""
import sys
import textwrap
from html import escape
from pathlib import Path

WIDTH = 880
LINE = 19     # pixels from one line to the next
LEFT = 18
COLUMNS = 108
SHOWN_STATES = 5   # of a progress bar
COLORS = {"$": "#9ece6a", "一": "#ffffff", "held": "#e0af68", "out:": "#7aa2f7"}


def lines_of(log):   # list of str
    "The lines of a terminal session: of a bar that is written over, a few states."
    lines = []
    for line in log.split("\n"):
        states = [state.strip() for state in line.split("\r") if state.strip()]
        if len(states) > SHOWN_STATES:
            chosen = range(0, len(states), len(states) // (SHOWN_STATES - 1))
            states = [states[i] for i in chosen][:SHOWN_STATES - 1] + states[-1:]
        lines += states
    return lines


def draw(lines):   # str, an SVG
    height = LINE * (len(lines) + 3)
    rows = []
    for i, line in enumerate(lines):
        color = "#c0caf5"
        for start, other in COLORS.items():
            if line.startswith(start):
                color = other
        y = LINE * (i + 3) - 4
        rows.append(f'<text x="{LEFT}" y="{y}" fill="{color}">{escape(line)}</text>')
    dots = "".join(
        f'<circle cx="{LEFT + 4 + 20 * i}" cy="18" r="6" fill="{color}"/>'
        for i, color in enumerate(("#f7768e", "#e0af68", "#9ece6a"))
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}">\n'
        f'<rect width="{WIDTH}" height="{height}" rx="9" fill="#1a1b26"/>{dots}\n'
        '<g font-family="ui-monospace, Menlo, Consolas, monospace" font-size="13" '
        'xml:space="preserve">\n' + "\n".join(rows) + "\n</g>\n</svg>\n"
    )


def main():
    log, picture = map(Path, sys.argv[1:3])
    lines = [f"$ {sys.argv[3]}"] if len(sys.argv) > 3 else []
    # as bytes: reading text would make a new line of each state of the bar
    for line in lines_of(log.read_bytes().decode("utf-8")):
        lines += textwrap.wrap(line, COLUMNS, drop_whitespace=False) or [""]
    picture.write_text(draw(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
