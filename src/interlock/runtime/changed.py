"""Tells any number of waiters that something changed. Not a queue: a waiter that was away looks once, and sees the latest."""

from __future__ import annotations

import asyncio


class Changed:
    """Take `next()` before looking, look, then wait on it: no change is missed in between."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def next(self) -> asyncio.Event:
        """An event that the next change sets."""
        return self._event

    def fire(self) -> None:
        """Wakes everybody who waits."""
        self._event.set()
        self._event = asyncio.Event()
