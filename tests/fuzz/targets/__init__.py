"""One parser a file."""
