"""Fidelity and diversity metrics of image generators, as the ADM reference evaluator computes them."""
