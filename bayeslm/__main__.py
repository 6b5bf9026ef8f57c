"""`python -m bayeslm`."""

from bayeslm.cli.app import app

app()
