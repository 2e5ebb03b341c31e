"""Stand-ins with the surface of the real thing: backend, engine process, server, hub."""
