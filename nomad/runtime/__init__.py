"""Where pods come from: local processes, Kubernetes, and a scriptable fake for tests."""
