"""Many documents at once: the scheduler, its pools, and the API in front of them."""
