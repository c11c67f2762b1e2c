"""The inference room: answers predictions, holds versions in slots, and changes what it serves only when a controller tells it to.

It decides nothing about swaps: it loads, warms, compares, routes, drains and releases on command, refuses commands that are older
than what it has seen, and keeps serving its last route when nobody commands. It never unpickles (`audit`).
"""
