"""Infrastructure used by all packages: files, downloads, hashing, engines and workers."""
