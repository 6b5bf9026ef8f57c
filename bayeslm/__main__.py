"""`python -m bayeslm`."""

from bayeslm.cli import app

app()
