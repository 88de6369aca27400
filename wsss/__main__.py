"""``python -m wsss``."""

from .cli import main

main()
