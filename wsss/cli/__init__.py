"""The command line: one file a command, in data-flow order."""
