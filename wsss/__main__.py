"""``python -m wsss``."""

from .cli.main import main

main()
