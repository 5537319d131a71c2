"""What of a master is for Kubernetes alone: it keeps there what it must not forget, and one of several leads.

its whole life         incluster: what `nomad master` runs
which one leads        election (pure), leader: the lease, standby: calls between masters
what it remembers      store: `KubernetesStore`, made of objects (Pipelines), changes, owned, past, state, bundles;
                       writes: how all of them write
Pipelines as objects   resource: what they look like, pipelines: what users change of them, report: what users see

The rest of the master imports nothing of this. How requests are made is `nomad.kubernetes`; where pods come from is
`nomad.runtime.kubernetes`.
"""
