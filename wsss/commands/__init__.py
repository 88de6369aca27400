"""The commands of ``wsss``, one file each; `wsss.cli` puts them together. A body builds a spec, calls one function, prints."""
