"""Wherry and Debian's containerd side by side: `python -m bench`. README.md says what each row means."""
