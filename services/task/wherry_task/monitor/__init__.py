"""The monitor: Wherry's shim, one small process per container, forked from a zygote. README.md has the protocol.

Everything below this package runs inside every monitor, so it imports the plain standard library only, and of that
only what costs few private pages: no asyncio, typing at run time, subprocess, enum-laden socket or signal.
"""
