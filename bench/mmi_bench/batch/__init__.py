"""Many documents at once against the same documents one after another."""
