"""Command line `mmi`: the table of commands, and the commands that run without torch."""
