"""Clients of a running Interlock, for programs and for the command line.

`InferenceClient` asks for predictions with numpy arrays; `AdminClient` handles swaps, models and runs; `interlock.client.load` makes traffic
and measures it.
"""

from __future__ import annotations

from interlock.client.admin import AdminClient
from interlock.client.inference import Answer, InferenceClient

__all__ = ["AdminClient", "Answer", "InferenceClient"]
