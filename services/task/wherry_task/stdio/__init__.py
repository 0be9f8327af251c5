"""What processes read and write over the bus, and the logs of those that nobody listens to.

uris: what a stream's name means. spool: an output, kept in a file. outlet: its readers. inlet: the input and its
writers. logfile, journal: a log read across its rotations, and as output. shelf: where logs lie, and for how long.
streams: all of it, by process.
"""
