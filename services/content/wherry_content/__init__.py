"""Wherry's content service: committed blobs by digest, per namespace, and the ingests on their way."""
