"""The command line, on top of everything else."""

from .app import app

__all__ = ["app"]
