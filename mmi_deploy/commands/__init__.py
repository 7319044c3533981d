"""The commands of `mmi`, one per module. Each imports the part it needs only when it is called."""
