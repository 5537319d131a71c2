"""The master: it knows what should run (desired), what it asked for (requested) and what is (observed).

what it knows          state, observe (the only one who writes what is seen)
what it does           loop; reconcile/ decides (pure: what is known in, actions out); enact carries them out, with
                       rehome, relieve; restoring takes up what an earlier master had under way
where operators live   placing (at first), problem, judge, replan (while they run), moves, tally;
                       measuring, estimates
its end of channels    pods, gathered (by way of agents), pace, words; follow and asides for who looks on
what it remembers      store: sqlite and secret, or kube/; bundlecache, events
on Kubernetes          kube/: its store there, Pipelines as objects, which of several masters leads
what users call        app: `Master`, emulation; rest/: the same over REST; views, show; metrics (of rows, written
                       by exposition)
all of it together     assembly, serve; cycles
"""
