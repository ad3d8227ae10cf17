"""OpenTelemetry metrics of pools, those of the whole host once.

    instrumentation = instrument(pool)      # in every worker; of several: instrument(one, other)
    instrumentation.uninstrument()

Needs `pip install 'shmpool[opentelemetry]'`: the API alone. Without an SDK in the program nothing is done.

    a reader collects -> the callback of each instrument -> the first one that is asked takes one snapshot a pool
                                                         -> all of them answer from it

All instruments are asynchronous: nothing is done between two collections, and never anything in get() or release().

A snapshot has the figures of all processes, so only one may report it, or backends that add up workers would count it
as often as there are workers. Who has `flock()` on the pool's segment reports; who has not tries again at its next
collection. The kernel gives the lock up with its process, so there is no election and no file to be left behind. It is
a lock of this file alone: the core's are of another kind (fcntl), and neither sees the other.

Counters are what was counted since `instrument()`, which is when the SDK says that they began. A process that does not
report notes at each collection how far they are, and goes on from there when its turn comes: the sum over processes is
right, in deltas and in totals, up to what happened in the one interval in which the reporter died. What was told to a
provider before is never taken back, since it reckons deltas from that: so a process goes on from the total that it, or
the parent whose provider it has inherited, had told.

The API knows no asynchronous histogram, and the Python SDK takes none that was made elsewhere (the specification's
MetricProducer). So of each distribution there are a gauge of quantiles, over the time since the last collection
(of any reader), and two counters, of its times and of their sum: `shmpool.wait_time.quantile`, `.count`, `.sum`.

Invariants: the figures of a collection are of one snapshot. A callback raises nothing because of a pool: one that
cannot be read is left out. One reader's collection at a time (the SDK's own rule).

Not here: the list of metrics (`metrics`), what they mean (docs/guide/observing.md), histograms (`exporter`).
"""

from __future__ import annotations

import fcntl
import functools
import os
import threading
from collections import Counter as Multiset
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary, WeakSet

try:
    from opentelemetry.metrics import CallbackOptions, Meter, MeterProvider, Observation, get_meter_provider
except ModuleNotFoundError as missing:
    raise ImportError("the integration needs opentelemetry-api: pip install 'shmpool[opentelemetry]'") from missing

from .. import __version__, slab
from ..errors import PoolError
from ..metrics import METRICS, POOL, Counter, Gauge, Look, Times, look_at
from ..stats import Latency

if TYPE_CHECKING:
    from ..inspector import Inspector
    from ..pool import Pool

__all__ = ["Instrumentation", "instrument"]


def instrument(
    pool: Pool | Inspector, *more: Pool | Inspector, meter_provider: MeterProvider | None = None
) -> Instrumentation:
    """Report these pools to `meter_provider`, or to the global one, be it set now or later.

    Call it in each worker, before or after the fork; of all processes and providers that do, one reports a pool.
    A process whose reader ends before it does calls `uninstrument()`, or no other takes its part over. A pool that was
    closed is reported until then too. Raises a PoolError when one cannot be found or read.
    """
    return Instrumentation(_reporter(meter_provider), [_Watched(each) for each in (pool, *more)])


class Instrumentation:
    """Pools that are reported, as `instrument()` began it."""

    def __init__(self, reporter: _Reporter, watched: list[_Watched]) -> None:
        self._reporter = reporter
        self._watched = watched
        reporter.watched = [*reporter.watched, *watched]

    def uninstrument(self) -> None:
        """Report these pools no more: another process may. Once more does nothing.

        The instruments stay where they are, since the API cannot take one back, and have nothing to say."""
        mine, self._watched = self._watched, []
        self._reporter.watched = [each for each in self._reporter.watched if each not in mine]


# What is reported ---------------------------------------------------------------------------------------------------

_TIMES = [metric for metric in METRICS if isinstance(metric, Times)]
_Buckets = Mapping[tuple[int, int], int]  # (lower ns, upper ns): count
_Series = tuple[str, str, str]  # instrument, pool, the label's value


def _stem(times: Times) -> str:
    """The conventions' name is that of a histogram, and these are none."""
    return times.name.replace("db.client.connection.", "shmpool.")


def _quantile(times: Times) -> str:
    return f"{_stem(times)}.quantile"


def _counters(times: Times) -> Iterator[Counter]:
    def seconds(look: Look) -> float:
        return sum((lower + upper) * count for lower, upper, count in times.of(look)) / 2e9

    def count(look: Look) -> int:
        return sum(count for _, _, count in times.of(look))

    yield Counter(f"{_stem(times)}.count", "{time}", f"{times.about}: how many", count)
    yield Counter(f"{_stem(times)}.sum", "s", f"{times.about}: their sum", seconds)


_FIGURES: list[Gauge] = [metric for metric in METRICS if isinstance(metric, Gauge)]
_FIGURES += [counter for times in _TIMES for counter in _counters(times)]


def _buckets(times: Times, look: Look) -> _Buckets:
    found: Multiset[tuple[int, int]] = Multiset()
    for lower, upper, count in times.of(look):
        found[lower, upper] += count
    return found


def _quantiles(now: _Buckets, before: _Buckets) -> dict[str, float]:
    """In seconds, of what came between; none of nothing."""
    times = Latency.from_histogram([(*edges, count - before.get(edges, 0)) for edges, count in now.items()])
    named = {"0.5": times.p50, "0.95": times.p95, "0.99": times.p99, "0.999": times.p999, "1": times.max}
    return named if times.count else {}


# Who reports --------------------------------------------------------------------------------------------------------


class _Watched:
    """A pool, as one process follows it. Its descriptor of the segment is closed with the last who refers to it, which
    may be a collection in another thread."""

    def __init__(self, pool: Pool | Inspector) -> None:
        self._pool = pool
        look = look_at(pool)
        self._counted = {each.name: each.numbers(look) for each in _FIGURES}
        self._timed = {times.name: _buckets(times, look) for times in _TIMES}
        with _forks:
            self._segment = slab.open_checked(pool.name)
            self._status, self._pid = os.fstat(self._segment), os.getpid()
            _everywhere.add(self)

    def __del__(self) -> None:
        with _forks:
            if hasattr(self, "_status") and self._has_segment():
                os.close(self._segment)

    def _has_segment(self) -> bool:
        """Else the program has closed the descriptor, and the number may be its own by now."""
        try:
            return os.path.samestat(os.fstat(self._segment), self._status)
        except OSError:
            return False

    def observations(self, told: dict[_Series, float]) -> Iterator[tuple[str, Observation]]:
        """By the instrument's name; none where another process reports the pool. `told`: what counters had come to."""
        look = look_at(self._pool)
        numbers = {each.name: each.numbers(look) for each in _FIGURES}
        before, self._timed = self._timed, {times.name: _buckets(times, look) for times in _TIMES}
        counted, self._counted = self._counted, numbers
        if not self._is_ours():
            return
        for figure in _FIGURES:
            for value, number in numbers[figure.name].items():
                if isinstance(figure, Counter):
                    series = figure.name, look.name, value
                    told[series] = number = told.get(series, 0) + number - counted[figure.name].get(value, 0)
                yield figure.name, _observation(look, number, figure.label, value)
        for name, buckets in self._timed.items():
            for share, seconds in _quantiles(buckets, before[name]).items():
                yield name, _observation(look, seconds, "quantile", share)

    def _is_ours(self) -> bool:
        """Whether this process reports the pool: it does already, or the place was free."""
        if self._pid != os.getpid():  # forked without Python's knowledge
            self.leave_to_the_parent()
        if not self._has_segment():
            return False
        try:
            fcntl.flock(self._segment, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def leave_to_the_parent(self) -> None:
        """In a forked child: its descriptor is the parent's, lock included, until it is opened anew."""
        self._pid = os.getpid()
        if not self._has_segment():
            return
        try:
            own = os.open(f"/proc/self/fd/{self._segment}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # no descriptor is free: then this process does not report
            os.close(self._segment)
            self._segment = -1
            return
        os.dup2(own, self._segment, inheritable=False)
        os.close(own)


_everywhere: WeakSet[_Watched] = WeakSet()
_forks = threading.RLock()  # none happens between a descriptor's opening and its place in _everywhere, or in its end


def _after_fork() -> None:
    try:
        for each in _everywhere:
            each.leave_to_the_parent()
    finally:
        _forks.release()


os.register_at_fork(before=_forks.acquire, after_in_parent=_forks.release, after_in_child=_after_fork)


def _observation(look: Look, number: float, label: str, value: str) -> Observation:
    named = label if "." in label else f"shmpool.{label}"
    return Observation(number, {POOL: look.name, named: value} if label else {POOL: look.name})


# To whom ------------------------------------------------------------------------------------------------------------


class _Reporter:
    """The instruments of one meter provider. It keeps the first ones made for a name, so they are made once."""

    def __init__(self, meter: Meter) -> None:
        self.watched: list[_Watched] = []  # replaced, never changed: a collection may be going through it
        self._found: Mapping[str, list[Observation]] = {}
        self._answered: set[str] = set()
        self._told: dict[_Series, float] = {}
        for figure in _FIGURES:
            _creator(meter, figure)(figure.name, [self._callback(figure.name)], figure.unit, figure.about)
        for times in _TIMES:
            about = f"{times.about}: quantiles since the last collection"
            meter.create_observable_gauge(_quantile(times), [self._callback(times.name)], times.unit, about)

    def _callback(self, name: str) -> Callable[[CallbackOptions], list[Observation]]:
        return functools.partial(self._observe, name)

    def _observe(self, name: str, _: CallbackOptions) -> list[Observation]:
        """Who is asked a second time is asked in a new collection."""
        if name in self._answered or not self._answered:
            self._answered.clear()
            self._found = self._look()
        self._answered.add(name)
        return self._found.get(name, [])

    def _look(self) -> Mapping[str, list[Observation]]:
        found = defaultdict(list)
        for watched in self.watched:
            try:
                for name, observation in watched.observations(self._told):
                    found[name].append(observation)
            except (PoolError, ValueError):  # damaged meanwhile; an inspector that was closed
                continue
        return found


def _creator(meter: Meter, figure: Gauge) -> Callable[..., object]:
    """What is counted adds up over pools and hosts; seconds and flags do not."""
    if isinstance(figure, Counter):
        return meter.create_observable_counter
    return meter.create_observable_up_down_counter if figure.unit[0] == "{" else meter.create_observable_gauge


_reporters: WeakKeyDictionary[MeterProvider, _Reporter] = WeakKeyDictionary()
_global: list[_Reporter] = []  # of the global provider, which is another object until it is set


def _reporter(meter_provider: MeterProvider | None) -> _Reporter:
    everyones = get_meter_provider()
    provider = meter_provider or everyones
    reporter = _reporters.get(provider) or (_global[0] if _global and provider is everyones else None)
    reporter = reporter or _Reporter(provider.get_meter("shmpool", __version__))
    if provider is everyones:
        _global[:] = [reporter]
    _reporters[provider] = reporter
    return reporter
