"""Features of batches of images: extracted once, kept in a store, summed up, saved as files."""
