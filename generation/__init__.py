"""Sample image batches from trained diffusion models with classifier guidance."""
