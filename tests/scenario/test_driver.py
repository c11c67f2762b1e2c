"""The driver of golden histories parses, compares and rewrites; a history that nobody can fail would prove nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from scenario.driver import Block, parse, play

STORY = "# greets\nsay hello to=world\nbody\n----\nhello world body\n\n# a remark on its own\n\nsay bye to=all\n----\nbye all\n"


def _echo(block: Block) -> str:
    return " ".join([block.words[1], block.option("to"), *block.body])


def test_a_true_history_passes(tmp_path: Path) -> None:
    path = tmp_path / "story.txt"
    path.write_text(STORY)
    play(path, _echo)


def test_a_false_history_fails_and_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "story.txt"
    path.write_text(STORY.replace("bye all", "bye nobody", 1))
    with pytest.raises(AssertionError, match=r"story\.txt:9: say bye"):
        play(path, _echo)


def test_rewrite_changes_only_the_traces(tmp_path: Path) -> None:
    path = tmp_path / "story.txt"
    path.write_text(STORY.replace("hello world body", "something else"))
    play(path, _echo, rewrite=True)
    assert path.read_text() == STORY


def test_a_block_without_dashes_is_refused() -> None:
    with pytest.raises(ValueError, match="history:1: the block 'say x' has no '----' line"):
        parse("say x\n")
