"""Proposals, tempering, potentials, and the kernel for Pyro's MCMC."""
