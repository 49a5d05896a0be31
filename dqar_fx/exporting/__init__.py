"""A plan's steps as programs that run without this library."""
