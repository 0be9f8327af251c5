"""Wherry's task service: running containers over any OCI runtime."""
