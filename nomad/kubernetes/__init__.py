"""Nomad's share of a Kubernetes cluster: its names there, its client of the API, and the objects that it makes."""
