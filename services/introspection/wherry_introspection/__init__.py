"""Wherry's introspection service: what runs here and what it can."""
