"""The gateway: HTTP for applications, gRPC towards the rooms. Holds no state of its own that a restart would lose."""
