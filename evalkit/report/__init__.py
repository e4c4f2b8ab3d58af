"""Results as text, figures and grids of images."""
