"""HTTP application: routes, limits, keys, health, metrics, logs and the page."""
