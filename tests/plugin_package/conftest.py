# The package is no part of the library: tests/test_plugins.py runs its tests, in a process of their own.
collect_ignore = ["tests"]
