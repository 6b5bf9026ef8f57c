"""Populations of particles, resampling, twists and how they are learned."""
