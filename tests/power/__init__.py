"""Power cuts of a whole node under load: `python -m power`, `make power`.

The node's root lies on a disk that logs its writes and flushes (disk.py). load.py uses the node and notes when it was
answered; then the disk is made anew as the power might have left it at moments of that time, and on each a node is
started as after a boot, and held against what had been answered by then (check.py).
"""
