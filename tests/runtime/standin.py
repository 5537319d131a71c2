"""Stands in for the pod's program in tests of the local runtime: behaves as its operator's name says."""

import json
import os
import signal
import subprocess
import sys
import time

boot = json.loads(os.environ["NOMAD_POD"])
behaviour = boot["pod"].split(".")[1].split("-")[0]
if behaviour == "exit3":
    sys.exit(3)
elif behaviour == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("deaf")
elif behaviour == "chatty":
    for n in range(5):
        print("line", n)
elif behaviour == "environment":
    print(json.dumps(dict(os.environ)))
elif behaviour == "parent":
    child = subprocess.Popen(["sleep", "600"])
    print(child.pid)
elif behaviour == "flood":
    n = 0
    while True:
        print(f"{n} " + "x" * 100)
        n += 1
        time.sleep(0.0001)
time.sleep(600)
