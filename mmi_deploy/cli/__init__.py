"""The command line `mmi`: the table of commands, and those that need neither torch nor training."""
