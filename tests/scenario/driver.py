"""Golden histories: a story as a text file, input and expected trace in one. Not a test itself: it parses, compares, rewrites.

A file is a list of blocks, separated by blank lines:

    # a comment, kept where it stands
    directive word key=value key=value
    more input, any number of lines
    ----
    what the handler answered, without blank lines

`play` calls the handler once per block, in order, and compares the answer with what stands below the dashes; the handler keeps its
state in a closure or an object of its own. With `rewrite` the file is written anew from the answers, and the diff is for a person
to review. A file that ends in an unexpected place names its line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

DASHES = "----"


@dataclass(frozen=True, slots=True)
class Block:
    """One directive with its input and the answer that the file expects."""

    line: int
    comments: tuple[str, ...]
    head: str
    body: tuple[str, ...]
    expected: tuple[str, ...]
    words: tuple[str, ...] = field(default=())
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def directive(self) -> str:
        """The first word of the block's head."""
        return self.words[0]

    def option(self, key: str, default: str = "") -> str:
        """The text behind `key=` in the head."""
        return self.options.get(key, default)


Handler = Callable[[Block], str]


def parse(text: str, where: str = "history") -> list[Block]:
    """The blocks of a history; raises ValueError naming the line of a block that has no dashes."""
    blocks: list[Block] = []
    chunk: list[tuple[int, str]] = []
    for number, line in enumerate([*text.splitlines(), ""], start=1):
        if line.strip():
            chunk.append((number, line.rstrip()))
        elif chunk:
            blocks.append(_block(chunk, where))
            chunk = []
    return blocks


def _block(chunk: list[tuple[int, str]], where: str) -> Block:
    comments = [line for _, line in chunk if line.startswith("#")]
    rest = [(number, line) for number, line in chunk if not line.startswith("#")]
    if not rest:
        return Block(chunk[0][0], tuple(comments), "", (), ())
    lines = [line for _, line in rest]
    if DASHES not in lines:
        raise ValueError(f"{where}:{rest[0][0]}: the block {lines[0]!r} has no '{DASHES}' line")
    cut = lines.index(DASHES)
    words = [word for word in lines[0].split() if "=" not in word]
    options = dict(word.split("=", 1) for word in lines[0].split() if "=" in word)
    return Block(
        rest[0][0], tuple(comments), lines[0], tuple(lines[1:cut]), tuple(lines[cut + 1 :]), tuple(words), options
    )


def render(blocks: list[Block], answers: list[tuple[str, ...]]) -> str:
    """The text of a history whose blocks answered `answers`."""
    out = []
    for block, answer in zip(blocks, answers, strict=True):
        lines = [*block.comments]
        if block.head:
            lines += [block.head, *block.body, DASHES, *answer]
        out.append("\n".join(lines) + "\n")
    return "\n".join(out)


def play(path: Path, handler: Handler, *, rewrite: bool = False) -> None:
    """Runs a history through `handler`; fails on the first block that answers otherwise, or rewrites the file."""
    blocks = parse(path.read_text(), path.name)
    answers: list[tuple[str, ...]] = []
    for block in blocks:
        answer = tuple(line.rstrip() for line in handler(block).splitlines() if line.strip()) if block.head else ()
        answers.append(answer)
        if not rewrite:
            assert answer == block.expected, _difference(path, block, answer)
    if rewrite:
        path.write_text(render(blocks, answers))


def _difference(path: Path, block: Block, answer: tuple[str, ...]) -> str:
    expected, got = "\n  ".join(block.expected), "\n  ".join(answer)
    return f"{path.name}:{block.line}: {block.head}\nexpected:\n  {expected}\ngot:\n  {got}\n(pytest --rewrite writes the new trace)"
