"""Wherry's diff service: layers onto mounts."""
