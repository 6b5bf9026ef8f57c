"""A Pyro program as engines see it: sites, plates, particles, handlers, results."""
