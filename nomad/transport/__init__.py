"""Bytes from here to there: whole frames, in order, over any of several transports.

`nomad.transport.base` is the seam, `nomad.transport.registry` finds the transport of an address.
Nothing here knows of actors, of messages or of what a frame means.
"""
