"""The command line: one file per verb, each parse, call, print."""
