"""Kubernetes for the tests, brought up on this machine from the projects' own sources.

`envtest` is etcd and an API server, `real` a cluster of three nodes with kubelets and containers, `scale` an
envtest with a thousand faked nodes. `python -m tests.kubernetes.cluster` starts and ends them from a command line.
Everything needs root and Debian, and Go for the first build; nothing outside `binaries.cache()` and the folder that
a caller names is written.
"""
