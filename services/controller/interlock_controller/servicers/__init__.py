"""gRPC faces of the controller: messages in, one call to the room's own verbs, messages out. No decision stands here."""
