"""Images as archives: OCI image layouts and `docker save`'s, read and written as streams, never laid out on disk."""
