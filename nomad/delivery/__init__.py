"""No message lost, doubled or out of order, through any number of broken connections.

`frames`, `codec`, `handshake`, `sender` and `receiver` are pure: bytes and the time go in, frames and
events come out. `driver` is the only file here that awaits. docs/delivery.md is the specification.
"""
