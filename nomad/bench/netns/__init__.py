"""Link backends that delay real packets between network namespaces: one namespace per node, as root, on Linux.

    namespaces  makes namespaces, and removes them whatever happens to the program that asked for them
    netem       links of veth pairs with the kernel's `tc netem`
    tun         links of TUN devices that a program in user space joins, for kernels without netem
    switch      that program: reads packets, holds each for its link, writes them to where they go
    inside      sockets inside a namespace, for measuring
    line        how long a link holds a packet; pure

Called through the seam `nomad.bench.links`. Nothing here sends a packet to or from the machine's own network.
"""
