"""The decisions of Interlock, pure: no clock, no network, no disk, no randomness of its own.

What a shell must do with this package, in this order:

1. take one *snapshot* of all it may look at;
2. call a decision here with the snapshot and `now`; get back new state and *commands* (frozen dataclasses);
3. *persist* the new state; only then carry out commands whose effect others can see, and only then *announce* (metrics, events);
4. expect any command to be carried out twice: after a crash the decision is taken again from what was persisted.

Illegal events raise `IllegalTransition` and change nothing. A verdict has three values: PASS, TRIP, INCONCLUSIVE.
"""
