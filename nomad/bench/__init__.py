"""`nomad bench`: one scenario, several policies side by side, every run in a cluster of its own.

    scenario   the file: topology, pipeline, timeline of events, policies; what is wrong with it, in words
    timeline   ramps and oscillations as single steps, and the phases between events; pure
    synthetic  the harness's own pipeline: a source at a rate, operators of given work, a sink that checks numbers
    links      the seam for what makes the network between nodes slow: the transport's shaping, or real packets
    policies   where operators are pinned and whether they may move
    runner     one run after the other, each with a fresh master and its state in a temporary folder
    results    percentiles, JSON, the table
    plots      latency over time, with events and moves

Called by the command line and by scripts in benchmarks/; it stands above the client and nothing imports it.
"""
