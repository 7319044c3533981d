"""Wire formats: JSON bodies to documents and options, events to replies and streams."""
