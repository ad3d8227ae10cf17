"""Every order that the core asks for, made weaker: is it needed?

What: a `Weakening` is all uses of one macro of atomics.h with one tag, at a weaker order, and the scenario of
tests/core/interleave.c that is walked so, in weak memory. `found`: the scenario fails, so the order is needed; else
nothing that we have shows that it is, and `why` says what keeps it. Without a scenario none reaches it.
Invariant: there is one for each step down of each order in the core (test_core).
Not here: the walk (test_core), the memory (tests/core/weak.h), the table for readers (docs/verification.md).
"""

from __future__ import annotations

from dataclasses import dataclass

# What each macro becomes: the call of stdatomic.h and its order.
MACROS = {
    "SHM_LOAD_ACQUIRE": ("load", "acquire"),
    "SHM_LOAD_SEQ": ("load", "seq_cst"),
    "SHM_STORE_RELEASE": ("store", "release"),
    "SHM_ADD_SEQ": ("fetch_add", "seq_cst"),
    "SHM_OR_SEQ": ("fetch_or", "seq_cst"),
    "SHM_AND_SEQ": ("fetch_and", "seq_cst"),
    "SHM_SWAP_SEQ": ("exchange", "seq_cst"),
    "SHM_CAS_SEQ": ("compare_exchange_strong", "seq_cst"),
}


@dataclass(frozen=True)
class Weakening:
    """`macro` with `tag` has the order `to`: walking `scenario` fails, or does not."""

    tag: str
    macro: str
    to: str
    scenario: str | None
    why: str
    found: bool = True

    @property
    def switch(self) -> str:
        """The argument for interleave.c."""
        return "weaken=" + ":".join((self.tag, *MACROS[self.macro], self.to))


def steps_down(macro: str) -> list[str]:
    """The weaker orders that stand below that of the macro, the next one first."""
    call, order = MACROS[macro]
    if order != "seq_cst":
        return ["relaxed"]
    return ["acquire" if call == "load" else "acq_rel", "relaxed"]


_ASLEEP = "a waiter sleeps beside a free slot"
_KEPT = "kept: as strong as the others of its tag; on x86 and Arm an RMW costs the same"
_PLAIN = "no scenario reaches it: what it publishes is plain data, which ThreadSanitizer follows"


def _both(
    tag: str, macro: str, scenario: str | None, why: str, found: bool = True, relaxed: str | None = None
) -> list[Weakening]:
    """Each step down with the same end; `relaxed`: what comes of the last one instead, which is found."""
    steps = [Weakening(tag, macro, to, scenario, why, found) for to in steps_down(macro)]
    if relaxed is not None:
        steps[-1] = Weakening(tag, macro, steps[-1].to, scenario, relaxed)
    return steps


WEAKENINGS = [
    *_both("slot", "SHM_CAS_SEQ", "lease", _ASLEEP, relaxed="the next holder has the row of the one before the last"),
    *_both("slot", "SHM_LOAD_SEQ", "wait", _ASLEEP),
    *_both("queue", "SHM_CAS_SEQ", "summary", _ASLEEP),
    *_both("queue", "SHM_LOAD_SEQ", "wait", _ASLEEP),
    *_both("queue", "SHM_OR_SEQ", "lease", _ASLEEP),
    *_both(
        "queue",
        "SHM_AND_SEQ",
        "summary",
        "a waiter takes its bit, which was cleared, for set, and sleeps beside a free slot",
    ),
    *_both("offer", "SHM_CAS_SEQ", "wait-handover", "an offer that nobody knows of"),
    *_both("offer", "SHM_LOAD_SEQ", "wait-handover", "an offer that nobody knows of"),
    *_both("futex", "SHM_CAS_SEQ", "two-waiters", "a wake-up dies with the leaver"),
    *_both("futex", "SHM_LOAD_SEQ", "orphan", "who sleeps is taken for woken already, and nobody wakes it"),
    *_both("futex", "SHM_SWAP_SEQ", "orphan", "who sleeps is taken for woken already, and nobody wakes it"),
    *_both("cap", "SHM_CAS_SEQ", "grow", "who looks after the cap was raised finds the slots of before, and sleeps"),
    *_both("cap", "SHM_LOAD_SEQ", "grow", "who looks after the cap was raised finds the slots of before, and sleeps"),
    *_both("cap", "SHM_SWAP_SEQ", "last-permit", "a connection is opened beyond the cap"),
    *_both("upstream", "SHM_CAS_SEQ", "herd", "who looks after a success does not see it, and sleeps"),
    *_both("upstream", "SHM_LOAD_SEQ", "herd", "who looks after a success does not see it, and sleeps"),
    *_both("account", "SHM_LOAD_ACQUIRE", "account", "more reasons than ends are seen"),
    *_both("account", "SHM_CAS_SEQ", "account", _KEPT, found=False, relaxed="a number of connections is seen to fall"),
    *_both("account", "SHM_ADD_SEQ", "account", _KEPT, found=False, relaxed="more reasons than ends are seen"),
    *_both("event", "SHM_LOAD_ACQUIRE", "events", "an event that is whole is lost"),
    *_both("event", "SHM_CAS_SEQ", "events", _KEPT, found=False, relaxed="an event that is whole is lost"),
    *_both("worker", "SHM_LOAD_ACQUIRE", "join", "a worker is seen with the row of the one before"),
    *_both("worker", "SHM_STORE_RELEASE", "join", "a worker is seen with the row of the one before"),
    *_both("shown", "SHM_LOAD_ACQUIRE", "shown", "the time of the hook counts as time on lease"),
    *_both("shown", "SHM_AND_SEQ", "shown", _KEPT, found=False, relaxed="the time of the hook counts as time on lease"),
    *_both(
        "private", "SHM_LOAD_ACQUIRE", "join-threads", "a thread that finds its process joined has the cache of before"
    ),
    *_both(
        "private", "SHM_STORE_RELEASE", "join-threads", "a thread that finds its process joined has the cache of before"
    ),
    *_both(
        "private",
        "SHM_CAS_SEQ",
        "join-threads",
        _KEPT,
        found=False,
        relaxed="a thread that finds its process joined has the cache of before",
    ),
    *_both("service", "SHM_LOAD_SEQ", "serve", "a client waits beside an empty slot, and nobody watches"),
    *_both("service", "SHM_CAS_SEQ", "serve", "a client waits beside an empty slot, and nobody watches"),
    *_both(
        "service",
        "SHM_SWAP_SEQ",
        "serve-two",
        "kept: the arming that follows it orders enough, on no warm path",
        found=False,
    ),
    *_both("users", "SHM_LOAD_SEQ", "serve-and-close", "a thread waits at an epoll that is closed"),
    *_both("users", "SHM_ADD_SEQ", "serve-and-close", "a thread waits at an epoll that is closed"),
    *_both(
        "sweep",
        "SHM_LOAD_SEQ",
        "recover",
        "kept: that one alone wins is all that is asked, on no warm path",
        found=False,
    ),
    *_both(
        "sweep",
        "SHM_CAS_SEQ",
        "recover",
        "kept: that one alone wins is all that is asked, on no warm path",
        found=False,
    ),
    *_both("publish", "SHM_LOAD_ACQUIRE", None, _PLAIN, found=False),
    *_both("publish", "SHM_STORE_RELEASE", None, _PLAIN, found=False),
    *_both(
        "snapshot", "SHM_LOAD_ACQUIRE", None, "no scenario reaches it: it is of module_view.c; see below", found=False
    ),
]
