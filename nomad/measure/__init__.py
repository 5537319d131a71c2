"""What nodes, links and operators really do, from what is seen of them. Called by the master and the runtimes."""
