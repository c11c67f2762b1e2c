"""gRPC faces of the replica. Protobuf messages stop here: in, they become calls on the data plane and the replica; out, their answers become messages."""
