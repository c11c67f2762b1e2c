"""The trainer: runs, their steps, guards, checkpoints and rollbacks, over gRPC. See README.md beside this package.

Importing it turns gRPC's fork handlers off: this process starts children (fork, then exec at once), and the handlers, which are of use
only to a child that goes on in the same image, were seen to hang such a child for ever.
"""

import os

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
