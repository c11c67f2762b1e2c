"""Adapters of the ports: the only package that opens files, databases and buckets."""
