"""Engine on Ray: a deployment of Ray Serve whose replicas each have a batch engine."""
