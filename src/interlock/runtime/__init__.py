"""What every room's process needs around its own work: settings, logs, traces, metrics, errors on the wire, keys, life and death.

Nothing here decides anything about models or runs.
"""
