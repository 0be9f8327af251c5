"""Wherry's events service: the durable stream of what happened."""
