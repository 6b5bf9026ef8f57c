"""Training of guides: the loop, objectives, baselines, sources of particles, steps, checkpoints, callbacks."""
