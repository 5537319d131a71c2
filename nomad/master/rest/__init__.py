"""The master over REST: what the facade (`app.Master`) offers, as HTTP and JSON. It decides nothing.

api     every endpoint
forms   what they take, with its bounds
webapp  all of it as one application, with who may ask and how errors look; `serve` and `kube.incluster` start it
http/   what any such API needs, and nothing of Nomad's own
"""
