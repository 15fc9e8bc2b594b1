"""On PYTHONPATH of a run it writes a journal of the store's writes and, when told to, kills the whole run at one of them.

``SELFCASCADE_JOURNAL`` names the journal; ``SELFCASCADE_KILL`` says ``before:manifest:1`` or ``after:tar:3``: before or after which write of which class.
``SELFCASCADE_SIGNAL`` says by which signal, and who gets it: ``group:9``, as when it is not set, ``leader:15``, the first process of the run alone, or
``writer:15``, the process that writes alone.
"""

import fcntl
import importlib.abc
import importlib.util
import os
import signal
import sys

WRITES = ("put_new", "put_cache", "compare_and_swap")


def class_of(key):
    """What kind of object is written."""
    if key.startswith("cache/"):
        return "cache"
    if not key.startswith(("datasets/", "bases/", "upsamplers/", "samples/", "reports/")):
        return "record"
    name = key.rsplit("/", 1)[-1]
    if name in ("manifest.json", "latest.json"):
        return name.removesuffix(".json")
    return "tar" if name.endswith(".tar") else "sidecar"


def number_of(line):
    """Enter a write in the journal; how many of its class there are now, over all processes of the run."""
    with open(os.environ["SELFCASCADE_JOURNAL"], "a+") as journal:
        fcntl.flock(journal, fcntl.LOCK_EX)
        journal.seek(0)
        kind = line.split()[0]
        number = 1 + sum(entry.split()[0] == kind for entry in journal.read().splitlines())
        journal.write(line + "\n")
        return number


def strike():
    """Send the signal."""
    whom, _, number = os.environ.get("SELFCASCADE_SIGNAL", f"group:{signal.SIGKILL:d}").partition(":")
    send = os.killpg if whom == "group" else os.kill
    send(os.getpid() if whom == "writer" else os.getpgrp(), int(number))


def journaled(write):
    moment, _, rest = os.environ.get("SELFCASCADE_KILL", "").partition(":")

    def put(self, key, *arguments, **options):
        kind = class_of(key)
        chosen = rest == f"{kind}:{number_of(f'{kind} {key}')}"
        if chosen and moment == "before":
            strike()
        result = write(self, key, *arguments, **options)
        if chosen and moment == "after":
            strike()
        return result

    return put


class Finder(importlib.abc.MetaPathFinder):
    """Finds the store as everybody else does and changes its writes once it is loaded."""

    def find_spec(self, name, path=None, target=None):
        if name != "selfcascade.storage.store":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            for write in WRITES:
                setattr(module.Store, write, journaled(getattr(module.Store, write)))

        spec.loader.exec_module = exec_module
        return spec


if "SELFCASCADE_JOURNAL" in os.environ:
    sys.meta_path.insert(0, Finder())
