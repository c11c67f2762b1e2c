"""The controller room: decides which version serves, moves traffic by swaps, keeps the record, and rolls runs back.

It holds no model and carries no prediction. Everything it knows is in `controller.db`; everything it does to a replica or a trainer
goes over gRPC, may be repeated, and is fenced. With the controller gone, replicas serve on and training goes on.
"""
