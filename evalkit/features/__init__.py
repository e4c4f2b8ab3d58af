"""Features of batches of images: extraction, the feature store, means and covariances, files."""
