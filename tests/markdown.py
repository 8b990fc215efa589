"""Pages of Markdown as the tests read them: fenced blocks with the comments before them, inline code and links."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
LANGUAGES = ("bash", "python", "text")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and where the text begins. marks: what the HTML comments right before it
    say. A comment that begins with "setup" is a block of that language."""

    page: str
    line: int
    language: str
    text: str
    marks: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def why_not(self) -> str | None:
        """The reason why it is not run, where a comment gives one."""
        told = (mark.removeprefix("not run:").strip() for mark in self.marks if mark.startswith("not run:"))
        return next(told, None)

    @property
    def file(self) -> str | None:
        """The file that it shows, where its first line is nothing but the file's name."""
        named = re.match(r"# (\w+\.py)\n", self.text)
        return named.group(1) if named else None

    def commands(self) -> list[str]:
        """The command lines of a bash block, each in one line and without its comment."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [shlex.join(words) for line in lines if (words := shlex.split(line, comments=True))]


def pages() -> dict[str, str]:
    """The text of README.md and of every page in docs/, by its path from the root."""
    paths = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return {str(path.relative_to(ROOT)): path.read_text() for path in paths}


def blocks(page: str, text: str) -> list[Block]:
    """The blocks of a page, in its order."""
    found, marks, position = [], list[str](), 0
    pattern = re.compile(r"^<!--(?P<mark>.*?)-->|^```(?P<language>\S*)\n(?P<text>.*?)^```$", re.S | re.M)
    for match in pattern.finditer(text):
        if text[position : match.start()].strip():
            marks = []
        position = match.end()
        mark = (match["mark"] or "").strip()
        if match["language"] is not None:
            line = text.count("\n", 0, match.start("text")) + 1
            found.append(Block(page, line, match["language"], match["text"], tuple(marks)))
            marks = []
        elif mark.startswith("setup\n"):
            line = text.count("\n", 0, match.start("mark")) + 2
            found.append(Block(page, line, "setup", mark.removeprefix("setup\n") + "\n"))
        else:
            marks.append(mark)
    return found


def prose(text: str) -> str:
    """A page without its blocks and comments."""
    return re.sub(r"^```.*?^```$|<!--.*?-->", "", text, flags=re.S | re.M)


def spans(text: str) -> list[str]:
    """The inline code of a page's prose."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(text))]


def anchors(text: str) -> set[str]:
    """What links into a page may name, as GitHub makes it of the headings."""
    heads = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", head.strip().lower()).replace(" ", "-") for head in heads}


def links(text: str) -> list[str]:
    """Where a page's links and pictures lead."""
    return re.findall(r"(?:\]\(|<img src=\")([^)\s\"]+)", prose(text))
