"""The command line: one file per command, in data-flow order."""
