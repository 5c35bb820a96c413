"""The commands: each parses what was typed, calls one function, and returns its exit code."""
