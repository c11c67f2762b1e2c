"""Clients of a running Interlock, for programs and for the command line: `AdminClient` for swaps, models and runs."""

from __future__ import annotations

from interlock.client.admin import AdminClient

__all__ = ["AdminClient"]
