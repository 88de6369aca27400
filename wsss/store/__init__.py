"""The label store: its format, and where it is kept (this machine or an object store)."""
