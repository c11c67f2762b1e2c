"""Loading that does not hurt what serves: a child process tries a candidate first, and a large version stays in one.

- `child`    the child's program: low priority, no keys, bounded; verifies, builds, runs once, measures, reports; then ends, or serves on
- `wire`     what parent and child say to each other: small messages over a socket, tensors in shared memory; nothing is pickled
- `process`  the parent's end: starts, waits, pauses, and says how a child ended
- `isolated` an engine whose model lives in a child
- `memory`   whether there is room, by what was measured
- `pace`     how a load is held up while what serves is slow, and by which figures
- `loader`   the way of one load through all of this

Why processes: building and freeing half a gigabyte inside the serving process holds the interpreter for 70 ms at a time (freeing) and costs it
page faults and memory bandwidth; a malformed graph can kill whoever parses it; and only a process can be stopped in the middle, measured
exactly, and thrown away. A small version (below `isolate_mb`) is only tried in the child and then built in the serving process, where
a run costs no hop.
"""
