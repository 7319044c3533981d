"""Engine processes, and the connection of the front process to them."""
