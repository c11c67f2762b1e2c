"""The HTTP routes, by subject. Each states its scope; see `interlock_gateway.web`."""
