"""The master: it knows what should run (desired), what it asked for (requested) and what is (observed)."""
