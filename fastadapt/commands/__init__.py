"""The command line: each command a file; only cli.py knows them all."""
