"""Fetch, build and describe the reference batches that samples are compared with."""
