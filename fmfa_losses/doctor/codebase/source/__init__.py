"""The facts of one source file; `parser.py` runs this folder as a package of its own, by the standard library alone."""
