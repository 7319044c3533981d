"""HTTP server: a front process with the APIs and the page, and engine processes behind it."""
