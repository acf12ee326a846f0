"""The commands, one module each: the docstring is its help; `define_flags` and `main` do the rest.

Flags are defined when a command is run, not when its module is imported: two commands may define
flags of one name, and all of them can be imported together.
"""
