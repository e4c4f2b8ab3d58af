"""What every room stands on: files, downloads, hashing, processes that share work."""
