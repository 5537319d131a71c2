"""One operator at work: inbox -> function -> outbox, in a process of its own.

`progress`, `mode` and `journal` decide and remember; `execute` calls the user's function; `outbox` encodes and
sends; `operator` and `source` are the two kinds of actor. `host` is the process around one of them; by its `channel` it
speaks with the master, and `reports` is what it says there unasked.
"""
