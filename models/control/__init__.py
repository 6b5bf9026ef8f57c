"""Control as inference: environments, trajectories, policies and unknown worlds as Pyro programs."""
